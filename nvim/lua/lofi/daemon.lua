--- The editor's daemon: started by the first request, restarted after a crash.
local clock = require("lofi.clock")
local config = require("lofi.config")
local events = require("lofi.events")
local process = require("lofi.process")

local uv = vim.uv or vim.loop

--- Restarts after consecutive crashes.
local RESTARTS = 3

--- A process that ran this long (ms) resets the count of crashes.
local HEALTHY = 60000

--- How long (ms) leaving the editor waits for the daemon to exit.
local FAREWELL = 300

local M = {}

---@type lofi.Process? the process that gets requests
local current
---@type lofi.Process? the latest one, running or not
local latest
local restarts = 0
local hold_restart = function() end

--- Gets every notification; set by `lofi.tracks`.
---@type fun(method: string, params: table)
M.on_note = function() end

--- Gets every process that has exited; set by `lofi.tracks`.
---@type fun(ended: lofi.Process)
M.on_lost = function() end

local start

local function ended(which)
  local crashed = not which.stopping
  if current == which then
    current = nil
  end
  M.on_lost(which)
  local delay
  if crashed then
    if uv.hrtime() / 1e6 - which.started > HEALTHY then
      restarts = 0
    end
    if restarts < RESTARTS and not current then
      delay = config.options.restart_delay_ms * 2 ^ restarts
      restarts = restarts + 1
      hold_restart()
      hold_restart = clock.after(delay, function()
        if not current then
          start()
        end
      end)
    end
  end
  events.emit("daemon_exit", {
    code = which.code,
    expected = not crashed,
    restart_in_ms = delay,
    stderr = which.stderr[#which.stderr],
  })
end

function start()
  local err
  current, err = process.start(function(method, params)
    M.on_note(method, params)
  end, ended)
  latest = current or latest
  if current then
    local group = vim.api.nvim_create_augroup("lofi", { clear = true })
    vim.api.nvim_create_autocmd("VimLeavePre", { group = group, callback = M.leave })
  end
  return current, err
end

--- Sends a request, starting the daemon if necessary.
---@param method string
---@param params? table
---@param done fun(err?: lofi.Error, result?: table) called once, never before this function returns
---@param late? fun(result: table)
---@return lofi.Process? process the one that got the request
function M.request(method, params, done, late)
  local err
  if not current then
    hold_restart()
    current, err = start()
  end
  if not current then
    vim.schedule(function()
      done(err)
    end)
    return nil
  end
  current:request(method, params or vim.empty_dict(), done, late)
  return current
end

---@return boolean
function M.is_running()
  return current ~= nil
end

--- Stops the daemon and cancels its jobs. It exits within two seconds.
function M.stop()
  hold_restart()
  restarts = 0
  if current then
    current:stop()
    current = nil
  end
end

--- Kills the daemon.
function M.force_stop()
  hold_restart()
  restarts = 0
  if latest then
    latest:kill()
  end
  current = nil
end

--- The last lines on the latest daemon's standard error.
---@return string[]
function M.stderr()
  return latest and vim.list_slice(latest.stderr) or {}
end

--- Closes the daemon's input when the editor exits, so that it can exit cleanly.
function M.leave()
  hold_restart()
  if current then
    current:stop()
    vim.fn.jobwait({ current.job }, FAREWELL)
  end
end

return M
