local t = require("harness")

local song = t.folder .. "/a song's file.wav"
vim.fn.writefile({ "RIFF" }, song)

--- A player of our own: notes what it was given, then does `then_what`.
local function player(then_what)
  local path = t.folder .. "/player"
  local text = '#!/bin/sh\necho "$$ $*" >>"%s.log"\n%s\n'
  vim.fn.writefile(vim.split(text:format(path, then_what), "\n"), path)
  vim.fn.setfperm(path, "rwxr-xr-x")
  vim.fn.delete(path .. ".log")
  return { path, "--quiet" }, function()
    return vim.fn.filereadable(path .. ".log") == 1 and vim.fn.readfile(path .. ".log") or {}
  end
end

local function play(lofi, path, seconds)
  return t.outcome(function(done)
    lofi.play(path, seconds, function(err)
      done(err)
    end)
  end)
end

t.test("a file is played with the command that is set, its path last and whole", function()
  local command, log = player("sleep 0.3")
  local lofi = t.fresh({ player = command })
  t.equal(play(lofi, song, 0.5), nil)
  t.equal(#log(), 1)
  t.equal(log()[1]:match("^%d+ (.*)$"), "--quiet " .. song)
  t.equal(lofi.is_playing(), false)
end)

t.test("stop ends the player and its children, and no other", function()
  local command, log = player("sleep 20 &\nwait")
  local lofi = t.fresh({ player = command })
  local other = vim.fn.jobstart({ command[1], "other" })
  local err = t.outcome(function(done)
    lofi.play(song, 20, done)
    t.wait(function()
      return #log() == 2
    end)
    t.equal(lofi.is_playing(), true)
    t.equal(lofi.stop_playing(), true)
    t.equal(lofi.is_playing(), false)
  end)
  t.equal(err, nil)
  local pids = {}
  for _, line in ipairs(log()) do
    local pid, args = line:match("^(%d+) (%S+)")
    pids[args] = tonumber(pid)
  end
  t.wait(function()
    return not t.alive(pids["--quiet"])
  end)
  t.equal(t.alive(pids.other), true)
  vim.fn.jobstop(other)
  t.equal(lofi.stop_playing(), false)
end)

t.test("another file takes the place of the one that plays", function()
  local command, log = player("exec sleep 20")
  local lofi = t.fresh({ player = command })
  local first
  lofi.play(song, 20, function(err)
    first = err or "stopped"
  end)
  t.wait(function()
    return #log() == 1
  end)
  lofi.play(song, 20)
  t.wait(function()
    return first and #log() == 2
  end)
  t.equal(first, "stopped")
  t.equal(lofi.is_playing(), true)
  t.equal(t.alive(tonumber(log()[1]:match("%d+"))), false)
  lofi.stop_playing()
end)

t.test("a player that ends too soon, in silence and with 0, has not played it", function()
  local command = player("exit 0")
  local lofi = t.fresh({ player = command })
  local err = play(lofi, song, 5)
  t.equal(err.code, "PLAYBACK_FAILED")
  t.has(err.message, "after 0.")
  t.has(err.message, song)
  t.equal(play(lofi, song).code, "PLAYBACK_FAILED")
end)

t.test("what a player says when it fails is told", function()
  local command = player("echo 'no such device' >&2; exit 0")
  local lofi = t.fresh({ player = command })
  t.has(play(lofi, song, 5).message, "no such device")
  command = player("sleep 0.2; exit 3")
  lofi = t.fresh({ player = command })
  t.has(play(lofi, song, 0.2).message, "code 3")
end)

t.test("no player, a player that is not there, no file: each says so, with the file", function()
  local lofi = t.fresh({ player = { "/nowhere/mpv" } })
  t.has(play(lofi, song, 5).message, "/nowhere/mpv could not be started")
  t.has(play(lofi, t.folder .. "/gone.wav", 5).message, "gone.wav")
  local path = vim.env.PATH
  vim.env.PATH = t.folder
  lofi = t.fresh()
  local fine, err = pcall(play, lofi, song, 5)
  vim.env.PATH = path
  assert(fine, err)
  t.has(err.message, "install mpv or ffmpeg")
  t.has(err.message, song)
end)

t.test("players that are found are taken in their order", function()
  local bin = t.folder .. "/bin"
  vim.fn.mkdir(bin, "p")
  local path = vim.env.PATH
  vim.env.PATH = bin
  local fine, err = pcall(function()
    for _, name in ipairs({ "aplay", "paplay", "ffplay", "mpv" }) do
      vim.fn.writefile({ "#!/bin/sh" }, bin .. "/" .. name)
      vim.fn.setfperm(bin .. "/" .. name, "rwxr-xr-x")
      t.fresh()
      t.equal(require("lofi.player").command()[1], name)
    end
  end)
  vim.env.PATH = path
  assert(fine, err)
end)

t.test(
  "ffplay without a loudspeaker: a real song is played in its time, a broken one is told",
  function()
    if vim.fn.executable("ffplay") == 0 then
      return io.stdout:write("     ffplay is not here\n")
    end
    local lofi = t.fresh({
      player = {
        "env",
        "SDL_AUDIODRIVER=dummy",
        "ffplay",
        "-nodisp",
        "-autoexit",
        "-loglevel",
        "error",
      },
    })
    local wav = t.folder .. "/silence.wav"
    local rate, seconds = 8000, 1
    local function le(n, bytes)
      local out = ""
      for _ = 1, bytes do
        out, n = out .. string.char(n % 256), math.floor(n / 256)
      end
      return out
    end
    local data = ("\0\0"):rep(rate * seconds)
    local file = assert(io.open(wav, "wb"))
    file:write("RIFF", le(36 + #data, 4), "WAVEfmt ", le(16, 4), le(1, 2), le(1, 2), le(rate, 4))
    file:write(le(rate * 2, 4), le(2, 2), le(16, 2), "data", le(#data, 4), data)
    file:close()
    local began = t.now()
    t.equal(play(lofi, wav, seconds), nil)
    assert(t.now() - began > 500 * seconds, t.now() - began)
    local err = play(lofi, song, 5)
    t.equal(err.code, "PLAYBACK_FAILED")
  end
)

t.run()
