-- An editor in the middle of a job, for a test that ends it: FILE gets the daemon's number.
local lofi = require("lofi")
lofi.setup({ model = "mini", device = "cpu", env = { LOFI_CACHE_PATH = vim.env.CACHE } })
lofi.on("generation_progress", function()
  lofi.events.clear()
  for _, channel in ipairs(vim.api.nvim_list_chans()) do
    if channel.stream == "job" then
      vim.fn.writefile({ tostring(vim.fn.jobpid(channel.id)) }, vim.env.FILE)
    end
  end
  if vim.env.LEAVE then
    vim.cmd("qall!")
  end
end)
lofi.generate({ prompt = "long", duration_sec = 30, inference_steps = 200 })
