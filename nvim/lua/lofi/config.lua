--- Options, and validation of requests before they are sent.
local M = {}

---@class lofi.Options
---@field cmd? string[] the daemon's command; default: this clone's own
---@field env? table<string, string> environment for the daemon, such as LOFI_CACHE_PATH
---@field model? string ACE-Step checkpoint: "mini", "xl-sft", "xl-turbo", a folder or a hub id
---@field device? string "auto", "cpu", "cuda" or "metal"
---@field threads? integer CPU threads
---@field backend? string "ace_step" or "musicgen", if a request names none
---@field duration_sec? integer duration if a request names none
---@field auto_play? boolean play tracks of commands when they are ready
---@field player? string[] command that plays a file, whose path is appended
---@field float? boolean show progress in a floating window
---@field timeout_ms? integer how long to wait for a response
---@field restart_delay_ms? integer delay before the first restart; doubles each time

--- Type of each option.
M.TYPES = {
  cmd = "table",
  env = "table",
  model = "string",
  device = "string",
  threads = "number",
  backend = "string",
  duration_sec = "number",
  auto_play = "boolean",
  player = "table",
  float = "boolean",
  timeout_ms = "number",
  restart_delay_ms = "number",
}

local DEFAULTS = {
  env = {},
  duration_sec = 30,
  auto_play = true,
  float = true,
  timeout_ms = 30000,
  restart_delay_ms = 500,
}

--- Shortest and longest track of each backend, in seconds.
local SECONDS = { ace_step = { 5, 240 }, musicgen = { 5, 120 } }

--- The largest integer that a Lua number holds exactly.
local EXACT = 9007199254740991

---@type lofi.Options
M.options = vim.deepcopy(DEFAULTS)

--- Replaces the options. Starts nothing.
---@param options? lofi.Options
function M.setup(options)
  for name, value in pairs(options or {}) do
    if not M.TYPES[name] then
      local known = vim.tbl_keys(M.TYPES)
      table.sort(known)
      local text = "lofi: unknown option %s; known: %s"
      error(text:format(vim.inspect(name), table.concat(known, ", ")), 3)
    elseif type(value) ~= M.TYPES[name] then
      error(("lofi: %s must be a %s, not a %s"):format(name, M.TYPES[name], type(value)), 3)
    elseif (name == "cmd" or name == "player") and type(value[1]) ~= "string" then
      error(("lofi: %s must be a list of the command and its arguments"):format(name), 3)
    end
  end
  M.options = vim.tbl_extend("force", vim.deepcopy(DEFAULTS), options or {})
end

--- The clone that contains this plugin, with links resolved.
---@return string
function M.root()
  local here = debug.getinfo(1, "S").source:sub(2)
  local uv = vim.uv or vim.loop
  return vim.fn.fnamemodify(uv.fs_realpath(here) or here, ":p:h:h:h:h")
end

--- The daemon's command: the option, or this clone's Python.
---@return string[]
function M.command()
  if M.options.cmd then
    return M.options.cmd
  end
  local inside = vim.fn.has("win32") == 1 and "/.venv/Scripts/python.exe" or "/.venv/bin/python"
  return { M.root() .. inside, M.root() .. "/app.py", "daemon" }
end

--- Extra environment variables for the daemon.
---@return table<string, string>
function M.environment()
  local o = M.options
  local set =
    { LOFI_ACE_STEP_MODEL_PATH = o.model, LOFI_DEVICE = o.device, LOFI_THREADS = o.threads }
  local env = vim.empty_dict()
  for name, value in pairs(vim.tbl_extend("force", set, o.env)) do
    env[name] = type(value) == "number" and ("%d"):format(value) or tostring(value)
  end
  return env
end

---@class lofi.Error
---@field code string constant, such as "QUEUE_FULL" or "DAEMON_CRASH"; see |lofi-errors|
---@field message string a sentence
---@field number? integer the JSON-RPC code, where there is one

---@param code string
---@param message string
---@param number? integer
---@return lofi.Error
function M.failure(code, message, number)
  return { code = code, message = message, number = number }
end

local function whole(value)
  return type(value) == "number" and value % 1 == 0
end

--- The params of a request, or an error if it is invalid.
---@param request string|lofi.Request
---@return table? params
---@return lofi.Error? err
function M.params(request)
  if type(request) == "string" then
    request = { prompt = request }
  elseif type(request) ~= "table" then
    return nil, M.failure("INVALID_PARAMS", "A request must be a prompt or a table.", -32602)
  end
  local p = vim.tbl_extend("keep", request, {
    backend = M.options.backend,
    duration_sec = M.options.duration_sec,
  })
  local prompt = p.prompt
  if type(prompt) ~= "string" or not prompt:find("%S") then
    local text = "The prompt is empty. Describe the music in a few words."
    return nil, M.failure("INVALID_PROMPT", text, -32006)
  end
  if not pcall(vim.fn.json_encode, prompt) then
    return nil, M.failure("INVALID_PROMPT", "The prompt is not valid UTF-8.", -32006)
  end
  if vim.fn.strchars(prompt) > 1000 then
    local text = "The prompt has %d characters; the limit is 1000. Shorten it."
    return nil, M.failure("INVALID_PROMPT", text:format(vim.fn.strchars(prompt)), -32006)
  end
  if p.backend ~= nil and not SECONDS[p.backend] then
    local text = "No backend %s. Choose ace_step or musicgen."
    return nil, M.failure("INVALID_BACKEND", text:format(vim.inspect(p.backend)), -32007)
  end
  local range = SECONDS[p.backend] or SECONDS.ace_step
  if not whole(p.duration_sec) or p.duration_sec < range[1] or p.duration_sec > range[2] then
    local text = "The duration must be %d to %d whole seconds, not %s."
    local got = vim.inspect(p.duration_sec)
    return nil, M.failure("INVALID_DURATION", text:format(range[1], range[2], got), -32005)
  end
  if p.priority ~= nil and p.priority ~= "normal" and p.priority ~= "high" then
    return nil, M.failure("INVALID_PARAMS", "The priority must be normal or high.", -32602)
  end
  if p.seed ~= nil and not (whole(p.seed) and p.seed >= 0 and p.seed <= EXACT) then
    local text = "The seed must be a whole number from 0 to %.0f, the largest one exact in Lua."
    return nil, M.failure("INVALID_PARAMS", text:format(EXACT), -32602)
  end
  return p
end

return M
