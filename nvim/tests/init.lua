-- Starts an editor with this plugin and nothing else, and gives tests what they share.
local here = vim.fn.fnamemodify(debug.getinfo(1, "S").source:sub(2), ":p:h")
vim.opt.runtimepath:prepend(vim.fn.fnamemodify(here, ":h"))
package.path = here .. "/?.lua;" .. package.path
vim.o.shadafile = "NONE"
vim.o.swapfile = false
