--- The public API. See |lofi|.
local config = require("lofi.config")
local daemon = require("lofi.daemon")
local events = require("lofi.events")
local player = require("lofi.player")
local progress = require("lofi.progress")
local tracks = require("lofi.tracks")

---@class lofi
---@field last_track? lofi.Track the last finished track
local M = setmetatable({}, {
  __index = function(_, name)
    if name == "last_track" then
      return vim.deepcopy(tracks.last_track)
    end
  end,
})

M.events = events
M.on = events.on

M.generate = tracks.generate
M.cancel = tracks.cancel
M.download_backend = tracks.download
M.is_generating = tracks.is_generating
M.current_track = tracks.current
M.open_tracks = tracks.open_tracks

M.is_daemon_running = daemon.is_running
M.stop = daemon.stop
M.force_stop = daemon.force_stop

M.play = player.play
M.stop_playing = player.stop
M.is_playing = player.is_playing

M.statusline = progress.statusline

--- Replaces the options; starts nothing. Options of the daemon apply from its next start.
---@param options? lofi.Options
function M.setup(options)
  config.setup(options)
end

--- Requests the backends and their status.
---@param done fun(err?: lofi.Error, result?: table) result: { backends, default_backend }
---@return boolean sent
function M.get_backends(done)
  return daemon.request("get_backends", nil, done) ~= nil
end

return M
