--- How far things are: one line in a float, and a text for the statusline. Both show what was last
--- told and ask nobody.
local clock = require("lofi.clock")
local config = require("lofi.config")

local M = {}

local text = ""
local asked_for = false
local buffer, window
local hold = function() end

---@param job? lofi.Job
---@param waiting integer
---@param downloads { backend: string, percent: integer }[]
---@return string
local function describe(job, waiting, downloads)
  local parts = {}
  if job then
    local part = job.percent > 0 and ("lofi %d%%"):format(job.percent) or "lofi loads"
    if job.eta_sec then
      part = part .. (", %d s left"):format(math.ceil(job.eta_sec))
    end
    if waiting > 0 then
      part = part .. (", %d waiting"):format(waiting)
    end
    table.insert(parts, part)
  end
  for _, download in ipairs(downloads) do
    table.insert(parts, ("%s %d%% fetched"):format(download.backend, download.percent))
  end
  return table.concat(parts, " | ")
end

local function shut()
  if window and vim.api.nvim_win_is_valid(window) then
    vim.api.nvim_win_close(window, true)
  end
  window = nil
end

local function draw()
  if text == "" or not config.options.float then
    return shut()
  end
  local line = " " .. text .. " "
  local place = {
    relative = "editor",
    anchor = "NE",
    row = vim.o.showtabline > 0 and 1 or 0,
    col = vim.o.columns,
    width = math.min(vim.fn.strdisplaywidth(line), vim.o.columns),
    height = 1,
    style = "minimal",
    focusable = false,
  }
  if not (buffer and vim.api.nvim_buf_is_valid(buffer)) then
    buffer = vim.api.nvim_create_buf(false, true)
  end
  vim.api.nvim_buf_set_lines(buffer, 0, -1, false, { line })
  local shown = window and vim.api.nvim_win_is_valid(window)
  if shown and vim.api.nvim_win_get_tabpage(window) == vim.api.nvim_get_current_tabpage() then
    vim.api.nvim_win_set_config(window, place)
  else
    shut()
    place.noautocmd = true
    window = vim.api.nvim_open_win(buffer, false, place)
  end
end

--- Draws, or tries again soon: some moments, such as the command-line window, allow no change.
local function redraw()
  hold()
  if not pcall(draw) then
    hold = clock.after(500, redraw)
  end
end

--- Shows how far things are; nothing, where nothing goes on.
---@param job? lofi.Job the running one
---@param waiting integer
---@param downloads { backend: string, percent: integer }[]
function M.show(job, waiting, downloads)
  local new = describe(job, waiting, downloads)
  if new == text then
    return
  end
  text = new
  redraw()
  if asked_for then
    pcall(vim.cmd, "redrawstatus")
  end
end

--- The text for a statusline, with `%` doubled: "lofi 45%%, 12 s left", or "".
---@return string
function M.statusline()
  asked_for = true
  return (text:gsub("%%", "%%%%"))
end

--- The window of the float, while it is there.
---@return integer?
function M.window()
  return window and vim.api.nvim_win_is_valid(window) and window or nil
end

return M
