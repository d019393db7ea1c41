--- A daemon process: sends requests, receives responses and notifications.
local clock = require("lofi.clock")
local config = require("lofi.config")
local events = require("lofi.events")
local reader = require("lofi.reader")

local uv = vim.uv or vim.loop

--- Lines of standard error to keep.
local KEPT = 50

--- How long (ms) a daemon may take to exit before it is killed.
local GRACE = 2000

---@class lofi.Process
---@field cmd string[]
---@field job integer
---@field started number when, in milliseconds
---@field spoken boolean whether it has sent any message
---@field stopping boolean whether it was told to stop
---@field code? integer exit code; nil while it runs
---@field stderr string[] its last lines
local Process = {}
Process.__index = Process

local M = {}

--- Some versions write large numbers rounded, but a seed must arrive exactly. The placeholder
--- cannot match inside a JSON string, where every quote has a backslash.
local function encode(message)
  local seed = message.params.seed
  if type(seed) ~= "number" then
    return vim.json.encode(message)
  end
  message.params.seed = "@seed@"
  local line = vim.json.encode(message)
  message.params.seed = seed
  return (line:gsub('"seed":"@seed@"', ('"seed":%.0f'):format(seed)))
end

--- Starts a daemon.
---@param on_note fun(method: string, params: table)
---@param on_exit fun(process: lofi.Process)
---@return lofi.Process? process
---@return lofi.Error? err
function M.start(on_note, on_exit)
  local cmd = config.command()
  for _, file in ipairs(config.options.cmd and { cmd[1] } or { cmd[1], cmd[2] }) do
    if vim.fn.executable(file) == 0 and not uv.fs_stat(file) then
      local text = "The daemon is not installed: %s is missing. Run `make install` in the clone, or"
        .. " set `cmd`."
      return nil, config.failure("DAEMON_NOT_FOUND", text:format(file))
    end
  end
  local self = setmetatable({
    cmd = cmd,
    started = uv.hrtime() / 1e6,
    spoken = false,
    stopping = false,
    stderr = {},
    waiting = {},
    last = 0,
  }, Process)
  local read = reader.new(function(message)
    self.spoken = true
    if message.method then
      events.guard(message.method, on_note, message.method, message.params or {})
    else
      self:on_response(message)
    end
  end, function(line)
    self:log("not a message: " .. line:sub(1, 200))
  end)
  local ok, job = pcall(vim.fn.jobstart, cmd, {
    cwd = config.root(),
    env = config.environment(),
    on_stdout = function(_, data)
      read(data)
    end,
    on_stderr = function(_, data)
      self:on_stderr(data)
    end,
    on_exit = function(_, code)
      self.code = code
      local lost = self:lost()
      for id = 1, self.last do
        self:settle(id, lost)
      end
      on_exit(self)
    end,
  })
  if not ok or job <= 0 then
    local why = ok and "it is not executable" or tostring(job):gsub("^Vim:", "")
    local text = "The daemon could not be started (%s): %s"
    local message = text:format(table.concat(cmd, " "), why)
    return nil, config.failure("DAEMON_SPAWN_FAILED", message)
  end
  self.job = job
  return self
end

--- The error for open requests and jobs of a process that has exited.
---@return lofi.Error
function Process:lost()
  local last = self.stderr[#self.stderr]
  last = last and (" Its last line: " .. last) or ""
  if self.stopping then
    return config.failure("GENERATION_CANCELLED", "The daemon was stopped.")
  elseif not self.spoken then
    local text = "The daemon exited at its start with code %d.%s See :checkhealth lofi."
    return config.failure("DAEMON_SPAWN_FAILED", text:format(self.code, last))
  end
  local text = "The daemon exited with code %d.%s"
  return config.failure("DAEMON_CRASH", text:format(self.code, last))
end

function Process:log(line)
  table.insert(self.stderr, line)
  if #self.stderr > KEPT then
    table.remove(self.stderr, 1)
  end
end

function Process:on_stderr(data)
  for i, piece in ipairs(data) do
    self.partial = ((self.partial or "") .. piece):sub(1, 2000)
    if i < #data or (#data == 1 and piece == "") then
      if self.partial:find("%S") then
        self:log(self.partial)
      end
      self.partial = ""
    end
  end
end

--- Passes the outcome of request `id` to its callback, or a late result to `late`.
function Process:settle(id, err, result)
  local entry = self.waiting[id]
  self.waiting[id] = nil
  if not entry then
    return
  elseif entry.overdue then
    if result and entry.late then
      events.guard("a callback", entry.late, result)
    end
    return
  end
  entry.hold()
  events.guard("a callback", entry.done, err, result)
end

function Process:on_response(message)
  local id, refusal = message.id, message.error
  if refusal then
    local data = type(refusal.data) == "table" and refusal.data or {}
    local details = data.details or refusal.message
    local err = config.failure(data.error_code or "INTERNAL_ERROR", details, refusal.code)
    if id == nil then
      self:log("rejected: " .. details)
    else
      self:settle(id, err)
    end
  elseif id ~= nil then
    self:settle(id, nil, message.result or {})
  end
end

--- Sends a request. Never blocks.
---@param method string
---@param params table
---@param done fun(err?: lofi.Error, result?: table) called once
---@param late? fun(result: table) called with a response that came after the timeout
function Process:request(method, params, done, late)
  self.last = self.last + 1
  local id = self.last
  local message = { jsonrpc = "2.0", id = id, method = method, params = params }
  local ok, line = pcall(encode, message)
  if not ok then
    vim.schedule(function()
      done(config.failure("INVALID_PARAMS", "The request cannot be encoded: " .. line, -32602))
    end)
    return
  end
  local entry = { done = done, late = late }
  entry.hold = clock.after(config.options.timeout_ms, function()
    entry.overdue = true
    local text = "No response to %s within %.3g s."
    local problem = text:format(method, config.options.timeout_ms / 1000)
    done(config.failure("DAEMON_TIMEOUT", problem))
  end)
  self.waiting[id] = entry
  -- This fails if the process has just exited; its exit then settles the request.
  pcall(vim.fn.chansend, self.job, line .. "\n")
end

--- Stops it by closing its input, and kills it if it does not exit.
function Process:stop()
  if self.stopping or self.code then
    return
  end
  self.stopping = true
  pcall(vim.fn.chanclose, self.job, "stdin")
  clock.after(GRACE, function()
    self:kill()
  end)
end

--- Kills it. Its exit counts as expected.
function Process:kill()
  if self.code then
    return
  end
  self.stopping = true
  local ok, pid = pcall(vim.fn.jobpid, self.job)
  if ok then
    uv.kill(pid, "sigkill")
  end
end

return M
