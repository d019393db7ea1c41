local t = require("harness")

--- The real daemon, as it is found by itself, on the embedded model.
local options = {
  model = "mini",
  device = "cpu",
  env = { LOFI_CACHE_PATH = t.folder .. "/cache", HF_HUB_OFFLINE = "1" },
  auto_play = false,
  restart_delay_ms = 50,
}
local lofi = require("lofi")
lofi.setup(options)

local PATIENCE = 120000

local heard = {}
for _, event in ipairs(lofi.events.EVENTS) do
  lofi.on(event, function(data)
    table.insert(heard, { event = event, data = data })
  end)
end

local function of(event, track_id)
  return vim.tbl_filter(function(one)
    return one.event == event and (not track_id or one.data.track_id == track_id)
  end, heard)
end

local function generate(request)
  return t.outcome(function(done)
    lofi.generate(request, done)
  end, PATIENCE)
end

--- The daemon's process.
local function pid()
  for _, channel in ipairs(vim.api.nvim_list_chans()) do
    if channel.stream == "job" then
      return vim.fn.jobpid(channel.id)
    end
  end
end

local short = { prompt = "warm lofi piano", duration_sec = 5, seed = 7, inference_steps = 20 }
local endless = { prompt = "a long one", duration_sec = 15, seed = 1, inference_steps = 120 }

t.test("backends: the embedded model is ready, MusicGen waits to be fetched", function()
  local err, result = t.outcome(lofi.get_backends, PATIENCE)
  t.equal(err, nil)
  local music, ace = unpack(result.backends)
  t.equal({ ace.type, ace.status, ace.max_duration_sec }, { "ace_step", "ready", 240 })
  t.equal({ music.type, music.max_duration_sec }, { "musicgen", 120 })
  t.equal(result.default_backend, "ace_step")
end)

t.test("the daemon killed in a job: DAEMON_CRASH, daemon_exit, a restart that works", function()
  local failed
  lofi.generate(endless, function(err)
    failed = err
  end)
  t.wait(lofi.current_track, "the job", PATIENCE)
  local old = pid()
  vim.loop.kill(old, "sigkill")
  t.wait(function()
    return failed and #of("daemon_exit") == 1
  end)
  t.equal(failed.code, "DAEMON_CRASH")
  local told = of("daemon_exit")[1].data
  t.equal({ told.expected, told.restart_in_ms }, { false, 50 })
  t.wait(lofi.is_daemon_running, "the restart")
  assert(pid() ~= old)
end)

local first

t.test("a track: rising progress, then a file of five seconds", function()
  local err, track = generate(short)
  t.equal(err, nil)
  first = track
  local percent = vim.tbl_map(function(one)
    return one.data.percent
  end, of("generation_progress", track.track_id))
  assert(#percent >= 15, vim.inspect(percent))
  for i = 2, #percent do
    assert(percent[i] > percent[i - 1] and percent[i] < 100, vim.inspect(percent))
  end
  local file = assert(io.open(track.path, "rb"))
  local bytes = file:read("*a")
  file:close()
  t.equal({ bytes:sub(1, 4), bytes:sub(9, 12) }, { "RIFF", "WAVE" })
  assert(#bytes > 5 * 48000 * 2 * 2 - 1 and #bytes < 5 * 48000 * 2 * 2 + 100000, #bytes)
  t.equal({ track.duration_sec, track.sample_rate, track.seed }, { 5, 48000, 7 })
  t.equal(#of("generation_start", track.track_id), 1)
  t.wait(function()
    return #of("generation_complete", track.track_id) == 1
  end)
end)

t.test("the same request again is there at once, the same file", function()
  local began = t.now()
  local err, track = generate(short)
  t.equal({ err, track.path, track.cached }, { nil, first.path, true })
  assert(t.now() - began < 2000, t.now() - began)
end)

t.test("cancel: the running one within a step, a waiting one at once", function()
  local running, waiting, cancelled_at
  lofi.generate(endless, function(err)
    running = err
  end)
  lofi.generate(vim.tbl_extend("force", endless, { seed = 2 }), function(err)
    waiting = err
  end)
  t.wait(function()
    return lofi.current_track() and lofi.current_track().percent > 0
  end, "progress", PATIENCE)
  t.equal(#lofi.open_tracks(), 2)
  lofi.cancel(lofi.open_tracks()[2])
  t.wait(function()
    return waiting
  end)
  t.equal({ waiting.code, running }, { "GENERATION_CANCELLED", nil })
  cancelled_at = t.now()
  lofi.cancel()
  t.wait(function()
    return running
  end, "the end", PATIENCE)
  t.equal(running.code, "GENERATION_CANCELLED")
  io.stdout:write(("     cancelled after %.0f ms\n"):format(t.now() - cancelled_at))
  t.equal(#of("generation_cancelled"), 2)
  t.equal(lofi.is_generating(), false)
end)

t.test("what the daemon refuses has its constant and a way out", function()
  local err = generate(vim.tbl_extend("force", short, { inference_steps = 999 }))
  t.equal({ err.code, err.number }, { "INVALID_INFERENCE_STEPS", -32009 })
  t.has(err.message, "200")
  err = generate(vim.tbl_extend("force", short, { steps = 9 }))
  t.equal({ err.code, err.number }, { "INVALID_PARAMS", -32602 })
  t.has(err.message, "steps")
  err = t.outcome(function(done)
    lofi.cancel("0123456789abcdef", done)
  end)
  t.equal(err.code, "TRACK_NOT_FOUND")
end)

-- Last, the editor is killed in the middle of a job; whoever started it looks for the daemon.
t.run(function()
  lofi.generate(endless)
  t.wait(function()
    return lofi.current_track() and lofi.current_track().percent > 0
  end, "progress", PATIENCE)
  vim.fn.writefile({ tostring(pid()) }, vim.env.FILE)
end)
