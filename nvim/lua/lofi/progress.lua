--- Progress: one line in a floating window, and a text for the statusline. Both show the latest
--- state and never ask the daemon.
local clock = require("lofi.clock")
local config = require("lofi.config")

local M = {}

local text = ""
local statusline_used = false
local buffer, window
local hold = function() end

---@param job? lofi.Job
---@param waiting integer
---@param downloads { backend: string, percent: integer }[]
---@return string
local function describe(job, waiting, downloads)
  local parts = {}
  if job then
    local part = job.percent > 0 and ("lofi %d%%"):format(job.percent) or "lofi loading"
    if job.eta_sec then
      part = part .. (", %d s left"):format(math.ceil(job.eta_sec))
    end
    if waiting > 0 then
      part = part .. (", %d queued"):format(waiting)
    end
    table.insert(parts, part)
  end
  for _, download in ipairs(downloads) do
    table.insert(parts, ("%s %d%% downloaded"):format(download.backend, download.percent))
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

--- Draws, or retries soon where windows cannot be changed, as in the command-line window.
local function redraw()
  hold()
  if not pcall(draw) then
    hold = clock.after(500, redraw)
  end
end

--- Shows the progress; hides the window if there is none.
---@param job? lofi.Job the running job
---@param waiting integer
---@param downloads { backend: string, percent: integer }[]
function M.show(job, waiting, downloads)
  local new = describe(job, waiting, downloads)
  if new == text then
    return
  end
  text = new
  redraw()
  if statusline_used then
    pcall(vim.cmd, "redrawstatus")
  end
end

--- The text for a statusline, with `%` doubled: "lofi 45%%, 12 s left", or "".
---@return string
function M.statusline()
  statusline_used = true
  return (text:gsub("%%", "%%%%"))
end

--- The floating window, while it is open.
---@return integer?
function M.window()
  return window and vim.api.nvim_win_is_valid(window) and window or nil
end

return M
