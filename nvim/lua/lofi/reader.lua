--- Splits a job's output into messages.
local M = {}

--- Makes a reader. It takes the data of |on_stdout|: a list of lines, where the first continues the
--- previous line and the last is incomplete.
---@param on_message fun(message: table)
---@param on_rubbish fun(line: string) a line that is not a JSON object
---@return fun(data: string[])
function M.new(on_message, on_rubbish)
  local parts = {}
  return function(data)
    for i, piece in ipairs(data) do
      if piece ~= "" then
        table.insert(parts, piece)
      end
      if i < #data and #parts > 0 then
        local line = table.concat(parts)
        parts = {}
        local luanil = { object = true, array = true }
        local ok, message = pcall(vim.json.decode, line, { luanil = luanil })
        if ok and type(message) == "table" then
          on_message(message)
        else
          on_rubbish(line)
        end
      end
    end
  end
end

return M
