local t = require("harness")

local function float_text(lofi_progress)
  local window = lofi_progress.window()
  if not window then
    return nil
  end
  return vim.api.nvim_buf_get_lines(vim.api.nvim_win_get_buf(window), 0, -1, false)[1]
end

t.test("the editor's start loads nothing and defines seven commands", function()
  for name in pairs(package.loaded) do
    assert(not name:find("^lofi"), name)
  end
  local commands = vim.api.nvim_get_commands({})
  local names = {}
  for name in pairs(commands) do
    if name:find("^Lofi") then
      table.insert(names, name)
    end
  end
  table.sort(names)
  t.equal(names, {
    "Lofi",
    "LofiAce",
    "LofiBackends",
    "LofiCancel",
    "LofiDownload",
    "LofiPlay",
    "LofiStop",
  })
  t.equal(rawget(_G, "lofi"), nil)
end)

t.test("Lofi makes a track: prompt, length, and a file at the end", function()
  t.fresh()
  local texts = t.shown(function()
    vim.cmd("Lofi warm | piano, 90 bpm 12")
  end, function(texts)
    return #texts > 0
  end)
  local sent = vim.json.decode(t.received()[2])
  t.equal(sent.params, { prompt = "warm | piano, 90 bpm", duration_sec = 12 })
  t.has(texts[1], "warm | piano, 90 bpm: saved as ")
end)

t.test("a number alone is a prompt, and 30 s the length of what names none", function()
  t.fresh()
  vim.cmd("Lofi 99")
  vim.cmd("LofiAce rain")
  t.wait(function()
    return #t.received() == 3
  end)
  local first, second = unpack(vim.tbl_map(vim.json.decode, vim.list_slice(t.received(), 2)))
  t.equal(first.params, { prompt = "99", duration_sec = 30 })
  t.equal(second.params, { prompt = "rain", duration_sec = 30, backend = "ace_step" })
end)

t.test("what is wrong with a command is one sentence", function()
  t.fresh()
  for command, part in pairs({
    ["Lofi beats of 1990"] = "The duration must be 5 to 240 whole seconds, not 1990.",
    ["Lofi refuse"] = "Ten songs wait already.",
    ["Lofi fail"] = "Too large.",
    ["LofiCancel"] = "There is no track to cancel.",
    ["LofiPlay " .. t.folder .. "/none.wav"] = "none.wav",
    ["LofiPlay"] = "no track yet",
    ["LofiStop"] = "nothing is playing",
  }) do
    local texts = t.shown(function()
      vim.cmd(command)
    end, function(texts)
      return #texts > 0
    end)
    t.equal(#texts, 1, command)
    t.has(texts[1], part)
  end
end)

t.test("what was made is played at once, and again by LofiPlay; LofiStop stops", function()
  local log = t.folder .. "/played"
  local script = ('echo "$1" >> %s; exec sleep 10'):format(log)
  local lofi = t.fresh({ auto_play = true, player = { "sh", "-c", script, "sh" } })
  t.shown(function()
    vim.cmd("Lofi warm piano")
  end, function(texts)
    return texts[1] == "lofi: playing: warm piano"
  end)
  t.wait(function()
    return vim.fn.filereadable(log) == 1 and #vim.fn.readfile(log) == 1
  end)
  t.equal(vim.fn.readfile(log), { lofi.last_track.path })
  vim.cmd("LofiStop")
  t.equal(lofi.is_playing(), false)
  vim.cmd("LofiPlay")
  t.wait(function()
    return #vim.fn.readfile(log) == 2
  end)
  vim.cmd("LofiStop")
end)

t.test("what a program asks for is not played", function()
  local lofi = t.fresh({ auto_play = true, player = { "sleep", "10" } })
  t.equal(
    t.outcome(function(done)
      lofi.generate("warm", done)
    end),
    nil
  )
  vim.wait(50)
  t.equal(lofi.is_playing(), false)
end)

t.test("progress: one float, its text, the statusline, and nothing left at the end", function()
  local lofi = t.fresh()
  local progress = require("lofi.progress")
  t.equal(lofi.statusline(), "")
  local windows = #vim.api.nvim_list_wins()
  vim.cmd("Lofi slow one")
  vim.cmd("Lofi queued two")
  t.wait(function()
    return (float_text(progress) or ""):find("%d+%%, %d+ s left, 1 queued")
  end, "the float")
  t.equal(#vim.api.nvim_list_wins(), windows + 1)
  t.equal(vim.api.nvim_get_current_win() == progress.window(), false)
  t.equal(vim.api.nvim_win_get_config(progress.window()).focusable, false)
  local line = "%{%v:lua.require'lofi'.statusline()%}"
  local shown = vim.api.nvim_eval_statusline(line, {}).str
  t.equal(" " .. shown .. " ", float_text(progress))

  vim.cmd("tabnew")
  t.wait(function()
    local window = progress.window()
    return window and vim.api.nvim_win_get_tabpage(window) == vim.api.nvim_get_current_tabpage()
  end, "the float on the new tab page")
  vim.cmd("tabclose")

  t.shown(function()
    vim.cmd("LofiCancel " .. lofi.open_tracks()[1])
    vim.cmd("LofiCancel " .. lofi.open_tracks()[2])
  end, function(texts)
    return #texts == 2 and texts[1]:find("cancelled: ")
  end)
  t.equal(progress.window(), nil)
  t.equal(#vim.api.nvim_list_wins(), windows)
  t.equal(lofi.statusline(), "")
end)

t.test("progress costs next to nothing", function()
  t.fresh()
  local progress = require("lofi.progress")
  local began = t.now()
  for percent = 1, 1000 do
    progress.show({ percent = percent, eta_sec = 1000 - percent }, 0, {})
  end
  local each = (t.now() - began) / 1000
  progress.show(nil, 0, {})
  assert(each < 10, each .. " ms a message")
end)

t.test("without the float there is the statusline", function()
  local lofi = t.fresh({ float = false })
  vim.cmd("Lofi slow one")
  t.wait(function()
    return lofi.statusline() ~= ""
  end)
  t.equal(require("lofi.progress").window(), nil)
end)

t.test("LofiBackends shows both, LofiDownload fetches one and says how far it is", function()
  local lofi = t.fresh()
  local texts = t.shown(function()
    vim.cmd("LofiBackends")
  end, function(texts)
    return #texts == 1
  end)
  t.has(texts[1], "musicgen: MusicGen-Small, not_installed, 5 to 120 s")
  t.has(texts[1], "ace_step: ACE-Step-3.5B, ready, 5 to 240 s, the default")
  local seen
  texts = t.shown(function()
    lofi.on("download_progress", function()
      seen = seen or lofi.statusline()
    end)
    vim.cmd("LofiDownload musicgen")
  end, function(shown)
    return #shown == 1
  end)
  t.equal(texts[1], "lofi: musicgen is installed.")
  t.has(seen, "musicgen 25%% downloaded")
  t.equal(lofi.statusline(), "")
end)

t.test("completion knows the backends and the open tracks", function()
  local lofi = t.fresh()
  t.equal(vim.fn.getcompletion("LofiDownload ", "cmdline"), { "ace_step", "musicgen" })
  vim.cmd("Lofi slow one")
  t.wait(lofi.current_track)
  t.equal(vim.fn.getcompletion("LofiCancel ", "cmdline"), { lofi.current_track().track_id })
end)

t.test("the help has a tag for every command, function, option, event and error", function()
  local doc = t.folder .. "/help/doc"
  vim.fn.mkdir(doc, "p")
  local text = vim.fn.readfile(t.root .. "/nvim/doc/lofi.txt")
  vim.fn.writefile(text, doc .. "/lofi.txt")
  vim.cmd("helptags " .. doc)
  local tags = {}
  for _, line in ipairs(vim.fn.readfile(doc .. "/tags")) do
    tags[line:match("^[^\t]+")] = true
  end
  local expected = { "lofi", "lofi.txt", "lofi-quickstart" }
  for name in pairs(vim.api.nvim_get_commands({})) do
    if name:find("^Lofi") then
      table.insert(expected, ":" .. name)
    end
  end
  local lofi = t.fresh()
  for name, value in pairs(lofi) do
    if type(value) == "function" then
      table.insert(expected, "lofi." .. name .. "()")
    end
  end
  vim.list_extend(expected, { "lofi.last_track", "lofi.events" })
  vim.list_extend(expected, lofi.events.EVENTS)
  for option in pairs(require("lofi.config").TYPES) do
    table.insert(expected, "lofi-option-" .. option)
  end
  for _, name in
    ipairs(vim.fn.systemlist({
      "grep",
      "-rhoE",
      'failure\\("[A-Z_]+"',
      t.root .. "/nvim/lua",
    }))
  do
    table.insert(expected, name:match('"(.+)"'))
  end
  for _, tag in ipairs(expected) do
    assert(tags[tag], "no help for " .. tag)
  end
  -- Every link leads somewhere: here, or into the editor's own help.
  local own = vim.env.VIMRUNTIME .. "/doc/tags"
  for _, line in ipairs(vim.fn.filereadable(own) == 1 and vim.fn.readfile(own) or {}) do
    tags[line:match("^[^\t]+")] = true
  end
  for _, line in ipairs(text) do
    for link in line:gmatch("|([^|%s]+)|") do
      assert(tags[link], "no help under |" .. link .. "|")
    end
    assert(vim.fn.strdisplaywidth(line) <= 78, "longer than 78: " .. line)
  end
end)

t.run()
