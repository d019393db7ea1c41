--- Plays one file at a time, in a child process.
local config = require("lofi.config")

local uv = vim.uv or vim.loop

--- Players in order of preference. The file's path is appended to the arguments.
local PLAYERS = {
  { { "mpv", "--no-config", "--no-video", "--no-input-terminal", "--msg-level=all=error" } },
  { { "ffplay", "-nodisp", "-autoexit", "-loglevel", "error" } },
  { { "afplay" }, on = "mac" },
  { { "pw-play" }, on = "linux" },
  { { "paplay" }, on = "linux" },
  { { "aplay", "-q" }, on = "linux" },
  {
    {
      "powershell",
      "-NoProfile",
      "-Command",
      "(New-Object System.Media.SoundPlayer $env:LOFI_FILE).PlaySync()",
    },
    on = "win32",
    by_environment = true,
  },
}

--- A player that exits before this share of a track has failed.
local PLAYED = 0.5

local M = {}

---@type integer? the running player
local playing

--- The command that plays a file, or nil if there is none.
---@return string[]? command
---@return boolean? by_environment the path is passed in LOFI_FILE, not as an argument
function M.command()
  if config.options.player then
    return config.options.player
  end
  for _, player in ipairs(PLAYERS) do
    local here = not player.on or vim.fn.has(player.on) == 1
    if here and vim.fn.executable(player[1][1]) == 1 then
      return player[1], player.by_environment
    end
  end
end

--- Plays a file, stopping any other. `done` is called when playback has ended, was stopped, or
--- failed.
---@param path string
---@param duration_sec? number its duration, to detect a player that fails silently
---@param done? fun(err?: lofi.Error)
function M.play(path, duration_sec, done)
  done = done or function() end
  M.stop()
  path = vim.fn.fnamemodify(path, ":p")
  local function failed(why)
    local err = config.failure("PLAYBACK_FAILED", ("%s File: %s"):format(why, path))
    vim.schedule(function()
      done(err)
    end)
  end
  if not uv.fs_stat(path) then
    return failed("The file does not exist.")
  end
  local command, by_environment = M.command()
  if not command then
    return failed("No player found; install mpv or ffmpeg, or set `player`.")
  end
  local argv = vim.list_extend({}, command)
  if not by_environment then
    table.insert(argv, path)
  end
  local stderr, started, job = {}, uv.hrtime(), nil
  local ok, result = pcall(vim.fn.jobstart, argv, {
    env = { LOFI_FILE = path },
    stderr_buffered = true,
    on_stderr = function(_, data)
      stderr = vim.tbl_filter(function(line)
        return line:find("%S")
      end, data)
    end,
    on_exit = function(_, code)
      local ran = (uv.hrtime() - started) / 1e9
      if playing ~= job then -- stopped by us
        return done()
      end
      playing = nil
      if code == 0 and ran >= (duration_sec or 1) * PLAYED then
        return done()
      end
      local why = stderr[#stderr] or ("it exited with code %d after %.1f s"):format(code, ran)
      failed(("%s failed: %s."):format(command[1], why))
    end,
  })
  if not ok or result <= 0 then
    return failed(("%s could not be started."):format(command[1]))
  end
  job, playing = result, result
end

--- Stops playback.
---@return boolean stopped false if nothing was playing
function M.stop()
  local job = playing
  playing = nil
  if job then
    vim.fn.jobstop(job)
  end
  return job ~= nil
end

---@return boolean
function M.is_playing()
  return playing ~= nil
end

return M
