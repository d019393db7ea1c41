-- An editor that is left in the middle of a job: FILE gets the daemon's number.
local t = require("harness")
local lofi = require("lofi")
lofi.setup({
  cmd = { vim.env.LOFI_TEST_PYTHON, vim.env.DAEMON },
  env = { LOFI_CACHE_PATH = t.folder },
})
lofi.generate("slow and long")
t.wait(function()
  return lofi.current_track() and lofi.current_track().percent > 0
end, "progress", 60000)
for _, channel in ipairs(vim.api.nvim_list_chans()) do
  if channel.stream == "job" then
    vim.fn.writefile({ tostring(vim.fn.jobpid(channel.id)) }, vim.env.FILE)
  end
end
vim.cmd("qall!")
