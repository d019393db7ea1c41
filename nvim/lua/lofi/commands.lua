--- The commands.
local config = require("lofi.config")
local lofi = require("lofi")

local M = {}

local function inform(text)
  vim.notify("lofi: " .. text)
end

--- Shows an error, with the command that helps if there is one.
---@param err lofi.Error
local function show_error(err)
  local text = err.message
  if err.code == "BACKEND_NOT_INSTALLED" then
    text = text .. " Download it with :LofiDownload."
  end
  vim.notify("lofi: " .. text, vim.log.levels.ERROR)
end

---@param path string
---@param duration_sec? number
local function play(path, duration_sec)
  lofi.play(path, duration_sec, function(err)
    if err then
      show_error(err)
    end
  end)
end

--- "warm piano 20" is a prompt and a duration; "20" alone is a prompt.
---@param words string
---@return string prompt
---@return integer? seconds
local function parse(words)
  local prompt, seconds = words:match("^(.-)%s+(%d+)%s*$")
  if not prompt or prompt == "" then
    return words, nil
  end
  return prompt, tonumber(seconds)
end

---@param words string
---@param backend? string
local function generate(words, backend)
  local prompt, seconds = parse(words)
  lofi.generate({ prompt = prompt, duration_sec = seconds, backend = backend }, function(err, track)
    if err and err.code == "GENERATION_CANCELLED" then
      inform("cancelled: " .. prompt)
    elseif err then
      show_error(err)
    elseif config.options.auto_play then
      inform("playing: " .. prompt)
      play(track.path, track.duration_sec)
    else
      inform(("%s: saved as %s"):format(prompt, track.path))
    end
  end)
end

function M.Lofi(args)
  generate(args.args)
end

function M.LofiAce(args)
  generate(args.args, "ace_step")
end

function M.LofiBackends()
  lofi.get_backends(function(err, result)
    if err then
      return show_error(err)
    end
    local lines = {}
    for _, b in ipairs(result.backends) do
      local default = b.type == result.default_backend and ", the default" or ""
      local seconds = ("%d to %d s"):format(b.min_duration_sec, b.max_duration_sec)
      table.insert(lines, ("%s: %s, %s, %s%s"):format(b.type, b.name, b.status, seconds, default))
    end
    vim.notify(table.concat(lines, "\n"))
  end)
end

function M.LofiDownload(args)
  lofi.download_backend(args.args, function(err, result)
    if err then
      show_error(err)
    elseif result.already_installed then
      inform(args.args .. " is already installed.")
    else
      inform(args.args .. " is installed.")
    end
  end)
end

function M.LofiPlay(args)
  local track = lofi.last_track
  if args.args ~= "" then
    play(vim.fn.expand(args.args))
  elseif track then
    play(track.path, track.duration_sec)
  else
    inform("no track yet. Generate one with :Lofi.")
  end
end

function M.LofiStop()
  if not lofi.stop_playing() then
    inform("nothing is playing.")
  end
end

function M.LofiCancel(args)
  lofi.cancel(args.args ~= "" and args.args or nil, function(err)
    if err then
      show_error(err)
    end
  end)
end

return M
