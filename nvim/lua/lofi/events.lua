--- Event handlers.
local M = {}

--- The events; for their fields see |lofi-events|.
M.EVENTS = {
  "generation_start",
  "generation_progress",
  "generation_complete",
  "generation_error",
  "generation_cancelled",
  "download_progress",
  "download_complete",
  "download_error",
  "daemon_exit",
}

---@type table<string, function[]>
local handlers = {}

local function check(event)
  if not vim.tbl_contains(M.EVENTS, event) then
    error(("lofi: unknown event %s"):format(vim.inspect(event)), 3)
  end
end

--- Calls `fn` with the remaining arguments. An error in it is shown, not raised.
---@param name string how to name it in the message
---@param fn function
function M.guard(name, fn, ...)
  local ok, why = pcall(fn, ...)
  if not ok then
    vim.notify(("lofi: %s failed: %s"):format(name, why), vim.log.levels.ERROR)
  end
end

--- Calls `handler(data)` at every `event`.
---@param event string one of |lofi-events|
---@param handler fun(data: table)
---@return fun() unsubscribe
function M.on(event, handler)
  check(event)
  handlers[event] = handlers[event] or {}
  table.insert(handlers[event], handler)
  return function()
    M.off(event, handler)
  end
end

---@param event string
---@param handler fun(data: table)
function M.off(event, handler)
  check(event)
  handlers[event] = vim.tbl_filter(function(other)
    return other ~= handler
  end, handlers[event] or {})
end

--- Calls all handlers of an event. An error in one does not affect the others.
---@param event string
---@param data table each handler gets a copy
function M.emit(event, data)
  check(event)
  for _, handler in ipairs(vim.list_slice(handlers[event] or {})) do
    M.guard("a handler of " .. event, handler, vim.deepcopy(data))
  end
end

--- Removes the handlers of one event, or of all.
---@param event? string
function M.clear(event)
  if event then
    check(event)
    handlers[event] = nil
  else
    handlers = {}
  end
end

---@param event string
---@return integer
function M.handler_count(event)
  check(event)
  return #(handlers[event] or {})
end

return M
