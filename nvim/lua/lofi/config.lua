--- The options, and what can be said about a request before the daemon sees it.
local M = {}

---@class lofi.Options
---@field cmd? string[] the daemon's command; default: this clone's own
---@field env? table<string, string> environment for the daemon, such as LOFI_CACHE_PATH
---@field model? string ACE-Step checkpoint: "mini", "xl-sft", "xl-turbo", a folder or a hub id
---@field device? string "auto", "cpu", "cuda" or "metal"
---@field threads? integer CPU threads
---@field backend? string "ace_step" or "musicgen", where a request names none
---@field duration_sec? integer length where a request names none
---@field auto_play? boolean play what a command made as soon as it is there
---@field player? string[] command that plays a file, whose path is appended
---@field float? boolean show progress in a float
---@field timeout_ms? integer how long an answer may take
---@field restart_delay_ms? integer pause before the first restart; it doubles with each

--- What each option is.
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

--- Seconds that each backend can make.
local SECONDS = { ace_step = { 5, 240 }, musicgen = { 5, 120 } }

--- The largest whole number up to which a Lua number is exact.
local EXACT = 9007199254740991

---@type lofi.Options
M.options = vim.deepcopy(DEFAULTS)

--- Sets the options anew. Starts nothing.
---@param options? lofi.Options
function M.setup(options)
  for name, value in pairs(options or {}) do
    if not M.TYPES[name] then
      local known = vim.tbl_keys(M.TYPES)
      table.sort(known)
      local text = "lofi: there is no option %s; there are %s"
      error(text:format(vim.inspect(name), table.concat(known, ", ")), 3)
    elseif type(value) ~= M.TYPES[name] then
      error(("lofi: %s is a %s, not a %s"):format(name, M.TYPES[name], type(value)), 3)
    elseif (name == "cmd" or name == "player") and type(value[1]) ~= "string" then
      error(("lofi: %s is a list of the command and its arguments"):format(name), 3)
    end
  end
  M.options = vim.tbl_extend("force", vim.deepcopy(DEFAULTS), options or {})
end

--- The clone that this plugin lies in, through links.
---@return string
function M.root()
  local here = debug.getinfo(1, "S").source:sub(2)
  local uv = vim.uv or vim.loop
  return vim.fn.fnamemodify(uv.fs_realpath(here) or here, ":p:h:h:h:h")
end

--- The daemon's command: the one set, or this clone's own.
---@return string[]
function M.command()
  if M.options.cmd then
    return M.options.cmd
  end
  local inside = vim.fn.has("win32") == 1 and "/.venv/Scripts/python.exe" or "/.venv/bin/python"
  return { M.root() .. inside, M.root() .. "/app.py", "daemon" }
end

--- What the daemon's environment has besides the editor's.
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

--- A request as the daemon takes it, or what is wrong with it.
---@param request string|lofi.Request
---@return table? params
---@return lofi.Error? err
function M.params(request)
  if type(request) == "string" then
    request = { prompt = request }
  elseif type(request) ~= "table" then
    return nil, M.failure("INVALID_PARAMS", "A request is a prompt or a table.", -32602)
  end
  local p = vim.tbl_extend("keep", request, {
    backend = M.options.backend,
    duration_sec = M.options.duration_sec,
  })
  local prompt = p.prompt
  if type(prompt) ~= "string" or not prompt:find("%S") then
    return nil, M.failure("INVALID_PROMPT", "Say in words what it should sound like.", -32006)
  end
  if not pcall(vim.fn.json_encode, prompt) then
    return nil, M.failure("INVALID_PROMPT", "The prompt is not valid UTF-8.", -32006)
  end
  if vim.fn.strchars(prompt) > 1000 then
    local text = "The prompt has %d characters; 1000 is the most."
    return nil, M.failure("INVALID_PROMPT", text:format(vim.fn.strchars(prompt)), -32006)
  end
  if p.backend ~= nil and not SECONDS[p.backend] then
    local text = "There is no backend %s; there are ace_step and musicgen."
    return nil, M.failure("INVALID_BACKEND", text:format(vim.inspect(p.backend)), -32007)
  end
  local range = SECONDS[p.backend] or SECONDS.ace_step
  if not whole(p.duration_sec) or p.duration_sec < range[1] or p.duration_sec > range[2] then
    local text = "The length is %d to %d whole seconds, not %s."
    local got = vim.inspect(p.duration_sec)
    return nil, M.failure("INVALID_DURATION", text:format(range[1], range[2], got), -32005)
  end
  if p.priority ~= nil and p.priority ~= "normal" and p.priority ~= "high" then
    return nil, M.failure("INVALID_PARAMS", "The priority is normal or high.", -32602)
  end
  if p.seed ~= nil and not (whole(p.seed) and p.seed >= 0 and p.seed <= EXACT) then
    local text = "The seed is a whole number from 0 to %.0f: Lua knows larger ones only roughly."
    return nil, M.failure("INVALID_PARAMS", text:format(EXACT), -32602)
  end
  return p
end

return M
