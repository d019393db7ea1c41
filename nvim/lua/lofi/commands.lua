--- What the commands do.
local config = require("lofi.config")
local lofi = require("lofi")

local M = {}

local function say(text)
  vim.notify("lofi: " .. text)
end

--- Shows what went wrong, and the way out where the editor has one.
---@param err lofi.Error
local function complain(err)
  local text = err.message
  if err.code == "BACKEND_NOT_INSTALLED" then
    text = text .. " :LofiDownload fetches it."
  end
  vim.notify("lofi: " .. text, vim.log.levels.ERROR)
end

---@param path string
---@param duration_sec? number
local function play(path, duration_sec)
  lofi.play(path, duration_sec, function(err)
    if err then
      complain(err)
    end
  end)
end

--- "warm piano 20" is a prompt and a length; "20" alone is a prompt.
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
      say("cancelled: " .. prompt)
    elseif err then
      complain(err)
    elseif config.options.auto_play then
      say("playing: " .. prompt)
      play(track.path, track.duration_sec)
    else
      say(("%s is in %s"):format(prompt, track.path))
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
      return complain(err)
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
      complain(err)
    elseif result.already_installed then
      say(args.args .. " is there already.")
    else
      say(args.args .. " is there.")
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
    say("there is nothing to play yet. :Lofi makes something.")
  end
end

function M.LofiStop()
  if not lofi.stop_playing() then
    say("nothing is playing.")
  end
end

function M.LofiCancel(args)
  lofi.cancel(args.args ~= "" and args.args or nil, function(err)
    if err then
      complain(err)
    end
  end)
end

return M
