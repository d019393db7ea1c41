-- Defines the commands. The module is loaded by the first one.
if vim.g.loaded_lofi then
  return
end
vim.g.loaded_lofi = true

if vim.fn.has("nvim-0.7") == 0 then
  vim.notify("lofi needs Neovim 0.9 or later.", vim.log.levels.ERROR)
  return
end

local function command(name, nargs, desc, complete)
  vim.api.nvim_create_user_command(name, function(args)
    require("lofi.commands")[name](args)
  end, { nargs = nargs, desc = desc, complete = complete })
end

local function open_tracks()
  return require("lofi").open_tracks()
end

local function backends()
  return { "ace_step", "musicgen" }
end

command("Lofi", "+", "Generate music: {prompt} [seconds]")
command("LofiAce", "+", "Generate music with ACE-Step: {prompt} [seconds]")
command("LofiBackends", 0, "List the backends and their status")
command("LofiDownload", 1, "Download a model", backends)
command("LofiPlay", "?", "Play the last track, or a file", "file")
command("LofiStop", 0, "Stop playback")
command("LofiCancel", "?", "Cancel a track", open_tracks)
