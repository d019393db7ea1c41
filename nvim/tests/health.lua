local t = require("harness")

--- What :checkhealth lofi shows.
local function report()
  vim.cmd("silent checkhealth lofi")
  local text = table.concat(vim.api.nvim_buf_get_lines(0, 0, -1, false), "\n")
  vim.cmd("bwipeout!")
  return text
end

t.test("all is told: editor, daemon, backends, disk, tracks, player", function()
  local lofi = t.fresh({
    env = { LOFI_CACHE_PATH = t.folder, LOFI_CACHE_MAX_MB = "200" },
    player = { "mpv" },
  })
  vim.fn.mkdir(t.folder .. "/tracks", "p")
  vim.fn.writefile({ ("x"):rep(3e6) }, t.folder .. "/tracks/one.wav")
  local text = report()
  local v = vim.version()
  for _, part in ipairs({
    ("Neovim %d.%d.%d"):format(v.major, v.minor, v.patch),
    "scripted.py",
    "version 1",
    "ace_step (ACE-Step-3.5B): ready, cpu, float32, ace-step-v1",
    "musicgen (MusicGen-Small): not_installed",
    ":LofiDownload musicgen downloads 2.4 GB",
    "1 tracks, 3 of 200 MB, in " .. t.folder .. "/tracks",
    "mpv",
  }) do
    t.has(text, part)
  end
  t.equal(text:find("older than 0.9", 1, true) ~= nil, vim.fn.has("nvim-0.9") == 0)
  t.equal(lofi.is_daemon_running(), false)
  local log = table.concat(t.received(), "\n")
  t.has(log, '"ping"')
end)

t.test("the daemon of the check ends with it", function()
  t.fresh({ env = { PIDFILE = t.folder .. "/pid" } })
  report()
  local pid = tonumber(vim.fn.readfile(t.folder .. "/pid")[1])
  t.wait(function()
    return not t.alive(pid)
  end, "the end", 1000)
end)

t.test("no daemon, and one that ends at its start: an error with what it said", function()
  t.fresh({ cmd = { "/nowhere/python" } })
  t.has(report(), "/nowhere/python is missing")
  t.fresh({ env = { SCRIPT = "broken" } })
  local text = report()
  t.has(text, "ERROR")
  t.has(text, "no module named torch")
end)

t.test("what the editor's own daemon said aside is shown", function()
  local lofi = t.fresh({ restart_delay_ms = 60000 })
  t.outcome(function(done)
    lofi.generate("crash now", done)
  end)
  t.has(report(), "the roof fell in")
end)

t.run()
