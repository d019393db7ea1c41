local t = require("harness")
local outcome = t.outcome

local function generate(lofi, request, ms)
  return outcome(function(done)
    lofi.generate(request, done)
  end, ms)
end

--- Writes down every event.
local function listen(lofi)
  local heard = {}
  for _, event in ipairs(lofi.events.EVENTS) do
    lofi.on(event, function(data)
      table.insert(heard, { event, data })
    end)
  end
  function heard.names()
    local names = {}
    for _, one in ipairs(heard) do
      table.insert(names, one[1])
    end
    return names
  end
  function heard.first(event)
    for _, one in ipairs(heard) do
      if one[1] == event then
        return one[2]
      end
    end
  end
  return heard
end

t.test("setup starts nothing, is fast and makes no global", function()
  local before = vim.tbl_keys(_G)
  local lofi
  local took = math.huge -- the best of some, on the processor's clock: the machine may be busy
  for _ = 1, 5 do
    local began = os.clock()
    lofi = t.fresh()
    took = math.min(took, 1000 * (os.clock() - began))
  end
  assert(took < 10, "it took " .. took .. " ms")
  t.equal(#vim.tbl_keys(_G), #before)
  t.equal(lofi.is_daemon_running(), false)
  vim.wait(100)
  t.equal(t.received(), {})
end)

t.test("setup refuses what it does not know, by name", function()
  local lofi = t.fresh()
  for options, part in pairs({
    [{ daemon_path = "x" }] = "daemon_path",
    [{ threads = "4" }] = "threads must be a number, not a string",
    [{ cmd = {} }] = "cmd must be a list",
  }) do
    local fine, err = pcall(lofi.setup, options)
    t.equal(fine, false)
    t.has(err, part)
  end
end)

t.test("without any options about the environment the daemon starts", function()
  local lofi = t.fresh()
  lofi.setup({ cmd = t.scripted.cmd })
  t.equal(outcome(lofi.get_backends), nil)
end)

t.test("a track: start, progress, complete, each once and in order", function()
  local lofi = t.fresh()
  local heard = listen(lofi)
  local sent
  local err, track = outcome(function(done)
    sent = lofi.generate({ prompt = "warm piano", duration_sec = 5 }, done)
    t.equal(lofi.is_generating(), true)
  end)
  t.equal(sent, true)
  t.equal(err, nil)
  t.equal(track.prompt, "warm piano")
  t.equal(track.model_version, nil)
  t.equal(vim.fn.readfile(track.path)[1], "RIFF")
  t.equal(lofi.last_track, track)
  t.equal(lofi.is_generating(), false)
  t.equal(lofi.current_track(), nil)
  t.wait(function()
    return #heard == 5
  end)
  local p = "generation_progress"
  t.equal(heard.names(), { "generation_start", p, p, p, "generation_complete" })
  t.equal(heard[1][2], {
    track_id = track.track_id,
    prompt = "warm piano",
    duration_sec = 5,
    seed = 7,
    position = 0,
    backend = "ace_step",
  })
  t.equal(heard[2][2].percent, 25)
end)

t.test("a prompt alone takes the options' length and backend", function()
  local lofi = t.fresh({ duration_sec = 12, backend = "musicgen" })
  generate(lofi, "warm")
  local sent = vim.json.decode(t.received()[2])
  t.equal(sent.params, { prompt = "warm", duration_sec = 12, backend = "musicgen" })
end)

t.test("what a person can do wrong is refused before it is sent", function()
  local lofi = t.fresh()
  for _, case in ipairs({
    { "   ", "INVALID_PROMPT", -32006 },
    { ("ü"):rep(1001), "INVALID_PROMPT", -32006 },
    { "\255\254", "INVALID_PROMPT", -32006 },
    { { prompt = 7 }, "INVALID_PROMPT", -32006 },
    { 7, "INVALID_PARAMS", -32602 },
    { { prompt = "a", duration_sec = 4 }, "INVALID_DURATION", -32005 },
    { { prompt = "a", duration_sec = 241 }, "INVALID_DURATION", -32005 },
    { { prompt = "a", duration_sec = 7.5 }, "INVALID_DURATION", -32005 },
    { { prompt = "a", duration_sec = "9" }, "INVALID_DURATION", -32005 },
    { { prompt = "a", duration_sec = 121, backend = "musicgen" }, "INVALID_DURATION", -32005 },
    { { prompt = "a", backend = "riffusion" }, "INVALID_BACKEND", -32007 },
    { { prompt = "a", priority = "urgent" }, "INVALID_PARAMS", -32602 },
    { { prompt = "a", seed = 2 ^ 53 }, "INVALID_PARAMS", -32602 },
    { { prompt = "a", seed = -1 }, "INVALID_PARAMS", -32602 },
    { { prompt = "a", seed = 0.5 }, "INVALID_PARAMS", -32602 },
    { { prompt = "a", seed = 0 / 0 }, "INVALID_PARAMS", -32602 },
    { { prompt = "a", seed = "7" }, "INVALID_PARAMS", -32602 },
  }) do
    local sent
    local err = outcome(function(done)
      sent = lofi.generate(case[1], done)
    end)
    t.equal(sent, false, vim.inspect(case[1]))
    t.equal({ err.code, err.number }, { case[2], case[3] }, vim.inspect(case[1]))
    t.has(err.message, ".")
  end
  t.equal(lofi.is_daemon_running(), false)
  t.equal(generate(lofi, ("ü"):rep(1000)), nil)
end)

t.test("a request that JSON cannot hold is refused, and the next one goes on", function()
  local lofi = t.fresh()
  t.equal(generate(lofi, { prompt = "a", scheduler = print }).code, "INVALID_PARAMS")
  t.equal(lofi.is_generating(), false)
  t.equal(generate(lofi, "warm"), nil)
end)

t.test("a seed arrives to the digit, whatever the prompt says", function()
  local lofi = t.fresh()
  for _, seed in ipairs({ 0, 2147483647, 123456789012345, 9007199254740991 }) do
    local prompt = ('say "seed":"@seed@" %.0f'):format(seed)
    t.equal(generate(lofi, { prompt = prompt, seed = seed }), nil)
    local lines = t.received()
    t.has(lines[#lines], ('"seed":%.0f'):format(seed))
    t.equal(vim.json.decode(lines[#lines]).params.prompt, prompt)
  end
end)

t.test("messages that come byte by byte, of 600 KB, or among rubbish", function()
  local lofi = t.fresh()
  for _, prompt in ipairs({ "bytes one ü", "big one", "noise one" }) do
    local err, track = generate(lofi, prompt)
    t.equal(err, nil, prompt)
    t.equal(track.prompt, prompt)
    t.equal(#(track.blob or ""), prompt == "big one" and 600000 or 0)
  end
end)

t.test("a refusal is an error with the constant, the number and the way out", function()
  local lofi = t.fresh()
  local heard = listen(lofi)
  t.equal(generate(lofi, "refuse me"), {
    code = "QUEUE_FULL",
    number = -32004,
    message = "Ten songs wait already.",
  })
  t.equal(heard.names(), {})
  t.equal(lofi.is_generating(), false)
end)

t.test("an error during the work ends the job", function()
  local lofi = t.fresh()
  local heard = listen(lofi)
  t.equal(generate(lofi, "fail please"), { code = "MODEL_LOAD_FAILED", message = "Too large." })
  t.equal(heard.names(), { "generation_start", "generation_error" })
  t.equal(lofi.is_generating(), false)
end)

t.test("a track that comes before the answer reaches its callback", function()
  local lofi = t.fresh()
  local err, track = generate(lofi, "reversed order")
  t.equal(err, nil)
  t.equal(track.prompt, "reversed order")
  t.equal(lofi.is_generating(), false)
end)

t.test("several jobs: each callback gets its own track, once", function()
  local lofi = t.fresh()
  local got = {}
  local prompts = { "one", "two", "three", "slow four", "one" }
  for i, prompt in ipairs(prompts) do
    lofi.generate(prompt, function(err, track)
      assert(not got[i], "called twice")
      got[i] = err and err.code or track.prompt
    end)
  end
  t.wait(function()
    return vim.tbl_count(got) == 4
  end)
  t.equal(got, { "one", "two", "three", nil, "one" })
  t.equal(lofi.is_generating(), true)
  t.equal(lofi.current_track().prompt, "slow four")
  t.equal(lofi.open_tracks(), { lofi.current_track().track_id })
  lofi.cancel()
  t.wait(function()
    return got[4]
  end)
  t.equal(got[4], "GENERATION_CANCELLED")
end)

t.test("cancel: the running one, one by its id, one that is not answered yet", function()
  local lofi = t.fresh()
  local heard = listen(lofi)
  local err = outcome(function(done)
    lofi.generate("slow one", done)
    t.equal(lofi.cancel(), true)
  end)
  t.equal(err.code, "GENERATION_CANCELLED")
  t.equal(heard.first("generation_cancelled").total_steps, 200)

  local first, second
  lofi.generate("slow two", function(e)
    first = e
  end)
  lofi.generate("queued three", function(e)
    second = e
  end)
  t.wait(function()
    return #lofi.open_tracks() == 2
  end)
  local queued = vim.tbl_filter(function(id)
    return id ~= lofi.current_track().track_id
  end, lofi.open_tracks())[1]
  local _, result = outcome(function(done)
    lofi.cancel(queued, done)
  end)
  t.equal(result.cancelled, true)
  t.wait(function()
    return first or second
  end)
  lofi.cancel()
  t.wait(function()
    return first and second
  end)
  t.equal({ first.code, second.code }, { "GENERATION_CANCELLED", "GENERATION_CANCELLED" })
end)

t.test("cancel with nothing to cancel says so and starts nothing", function()
  local lofi = t.fresh()
  local sent
  local err = outcome(function(done)
    sent = lofi.cancel(nil, done)
  end)
  t.equal({ sent, err.code }, { false, "TRACK_NOT_FOUND" })
  t.equal(lofi.is_daemon_running(), false)
end)

t.test("no daemon: DAEMON_NOT_FOUND, with the file that is missing", function()
  local lofi = t.fresh({ cmd = { "/nowhere/python" } })
  local err = generate(lofi, "warm")
  t.equal(err.code, "DAEMON_NOT_FOUND")
  t.has(err.message, "/nowhere/python")
  t.equal(lofi.is_generating(), false)
end)

t.test("a daemon that ends at its start: DAEMON_SPAWN_FAILED, three restarts, no more", function()
  local lofi = t.fresh({ env = { SCRIPT = "broken" }, restart_delay_ms = 40 })
  local delays = {}
  lofi.on("daemon_exit", function(data)
    t.equal({ data.code, data.expected }, { 1, false })
    t.has(data.stderr, "no module named torch")
    table.insert(delays, data.restart_in_ms or "none")
  end)
  local err = generate(lofi, "warm")
  t.equal(err.code, "DAEMON_SPAWN_FAILED")
  t.has(err.message, "no module named torch")
  t.wait(function()
    return #delays == 4
  end)
  vim.wait(500)
  t.equal(delays, { 40, 80, 160, "none" })
  t.equal(lofi.is_daemon_running(), false)
  t.equal(#t.received(), 4)
  t.equal(generate(lofi, "warm").code, "DAEMON_SPAWN_FAILED")
  t.equal(#t.received(), 5)
end)

t.test("a crash: jobs end with DAEMON_CRASH, the daemon comes back and works", function()
  local lofi = t.fresh({ restart_delay_ms = 50 })
  local heard = listen(lofi)
  local other
  lofi.generate("slow one", function(err)
    other = err
  end)
  t.wait(function()
    return lofi.current_track()
  end)
  local err = generate(lofi, "crash now")
  t.equal(err.code, "DAEMON_CRASH")
  t.has(err.message, "the roof fell in")
  t.wait(function()
    return other and heard.first("daemon_exit")
  end)
  t.equal(other.code, "DAEMON_CRASH")
  t.equal(heard.first("generation_error").code, "DAEMON_CRASH")
  t.equal(heard.first("daemon_exit").restart_in_ms, 50)
  t.equal(lofi.is_generating(), false)
  t.equal(lofi.is_daemon_running(), false)
  t.wait(lofi.is_daemon_running, "the restart")
  t.equal(generate(lofi, "warm"), nil)
end)

t.test(
  "a daemon that gives no answer: DAEMON_TIMEOUT; one that answers late is told to stop",
  function()
    local lofi = t.fresh({ timeout_ms = 300 })
    lofi.get_backends(function() end)
    local began = t.now()
    local err = generate(lofi, "mute")
    t.equal(err.code, "DAEMON_TIMEOUT")
    t.has(err.message, "0.3 s")
    assert(t.now() - began < 2000)
    t.equal(lofi.is_generating(), false)
    t.equal(generate(lofi, "late one").code, "DAEMON_TIMEOUT")
    t.wait(function()
      return (t.received()[#t.received()] or ""):find('"cancel"')
    end, "the cancel")
  end
)

t.test("stop ends what is made as cancelled, and a new request starts a new daemon", function()
  local lofi = t.fresh()
  local heard = listen(lofi)
  local before, after
  lofi.generate("slow one", function(err)
    before = err
  end)
  t.wait(function()
    return lofi.current_track() and lofi.current_track().total_steps
  end)
  lofi.stop()
  t.equal(lofi.is_daemon_running(), false)
  lofi.generate("warm", function(err, track)
    after = err or track.prompt
  end)
  t.wait(function()
    return before and after
  end)
  t.equal({ before.code, after }, { "GENERATION_CANCELLED", "warm" })
  t.equal(lofi.is_daemon_running(), true)
  t.equal(heard.first("daemon_exit"), { code = 0, expected = true })
  t.equal(heard.first("generation_cancelled").total_steps, 200)
end)

t.test("a daemon that does not end by itself is killed after two seconds", function()
  local lofi = t.fresh({ env = { SCRIPT = "deaf" } })
  local heard = listen(lofi)
  outcome(lofi.get_backends)
  local began = t.now()
  lofi.stop()
  t.wait(function()
    return heard.first("daemon_exit")
  end)
  local took = t.now() - began
  assert(took > 1500 and took < 4000, took)
  t.equal(heard.first("daemon_exit").expected, true)
end)

t.test("force_stop kills at once and starts nothing again", function()
  local lofi = t.fresh({ env = { SCRIPT = "deaf" }, restart_delay_ms = 20 })
  local heard = listen(lofi)
  outcome(lofi.get_backends)
  local began = t.now()
  lofi.force_stop()
  t.wait(function()
    return heard.first("daemon_exit")
  end)
  assert(t.now() - began < 1000)
  vim.wait(200)
  t.equal(lofi.is_daemon_running(), false)
end)

t.test("download: progress and end, by callback and event; there already", function()
  local lofi = t.fresh()
  local heard = listen(lofi)
  local err, result = outcome(function(done)
    lofi.download_backend("musicgen", done)
  end)
  t.equal({ err, result.backend }, { nil, "musicgen" })
  t.wait(function()
    return heard.first("download_complete")
  end)
  t.equal(heard.first("download_progress").overall_percent, 25)
  err, result = outcome(function(done)
    lofi.download_backend("ace_step", done)
  end)
  t.equal({ err, result.already_installed }, { nil, true })
end)

t.test("a handler that fails keeps nobody from anything", function()
  local lofi = t.fresh()
  local texts = t.shown(function()
    lofi.on("generation_complete", function()
      error("mine")
    end)
    local reached = false
    lofi.on("generation_complete", function()
      reached = true
    end)
    lofi.generate("warm", function()
      error("also mine")
    end)
    t.wait(function()
      return reached
    end)
  end, function(texts)
    return #texts == 2
  end)
  t.has(texts[1], "also mine")
  t.has(texts[2], "a handler of generation_complete failed")
  lofi.events.clear()
  t.equal(generate(lofi, "warm again"), nil)
end)

t.test("handlers: unsubscribe, count, clear, unknown names", function()
  local lofi = t.fresh()
  local n = 0
  local off = lofi.on("daemon_exit", function()
    n = n + 1
  end)
  t.equal(lofi.events.handler_count("daemon_exit"), 1)
  lofi.events.emit("daemon_exit", {})
  off()
  lofi.events.emit("daemon_exit", {})
  t.equal({ n, lofi.events.handler_count("daemon_exit") }, { 1, 0 })
  lofi.on("daemon_exit", function() end)
  lofi.events.clear()
  t.equal(lofi.events.handler_count("daemon_exit"), 0)
  local fine, err = pcall(lofi.on, "generated", print)
  t.equal(fine, false)
  t.has(err, '"generated"')
end)

t.run()
