--- Timers that can be cancelled.
local M = {}

--- Calls `fn` on the main loop after `ms` milliseconds.
---@param ms number
---@param fn fun()
---@return fun() cancel may be called at any time, repeatedly
function M.after(ms, fn)
  local timer = (vim.uv or vim.loop).new_timer()
  local function cancel()
    if timer then
      timer:stop()
      timer:close()
      timer = nil
    end
  end
  timer:start(
    math.floor(ms),
    0,
    vim.schedule_wrap(function()
      if timer then
        cancel()
        fn()
      end
    end)
  )
  return cancel
end

return M
