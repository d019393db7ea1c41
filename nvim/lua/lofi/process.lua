--- One daemon process: requests go in, answers and notifications come out.
local clock = require("lofi.clock")
local config = require("lofi.config")
local events = require("lofi.events")
local reader = require("lofi.reader")

local uv = vim.uv or vim.loop

--- Lines of standard error that are kept.
local KEPT = 50

--- How long a daemon may take to end by itself, in milliseconds.
local GRACE = 2000

---@class lofi.Process
---@field cmd string[]
---@field job integer
---@field started number when, in milliseconds
---@field spoken boolean whether it has ever said anything
---@field stopping boolean whether it was asked to end
---@field code? integer how it ended; nil while it runs
---@field stderr string[] the last lines it said aside
local Process = {}
Process.__index = Process

local M = {}

--- Lua 5.1 writes large numbers rounded in some editors; a seed must arrive to the digit. Inside a
--- JSON string every quote has a backslash, so that the mark can only be the seed itself.
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
      local text = "The daemon is not there: %s is missing. Run `make install` in the clone, or"
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
      self:answered(message)
    end
  end, function(line)
    self:keep("not a message: " .. line:sub(1, 200))
  end)
  local ok, job = pcall(vim.fn.jobstart, cmd, {
    cwd = config.root(),
    env = config.environment(),
    on_stdout = function(_, data)
      read(data)
    end,
    on_stderr = function(_, data)
      self:overheard(data)
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
    local told = text:format(table.concat(cmd, " "), why)
    return nil, config.failure("DAEMON_SPAWN_FAILED", told)
  end
  self.job = job
  return self
end

--- Why requests and jobs of a process that ended get no answer.
---@return lofi.Error
function Process:lost()
  local aside = self.stderr[#self.stderr]
  aside = aside and (" It said last: " .. aside) or ""
  if self.stopping then
    return config.failure("GENERATION_CANCELLED", "The daemon was stopped.")
  elseif not self.spoken then
    local text = "The daemon ended at its start with code %d.%s See :checkhealth lofi."
    return config.failure("DAEMON_SPAWN_FAILED", text:format(self.code, aside))
  end
  local text = "The daemon ended with code %d.%s"
  return config.failure("DAEMON_CRASH", text:format(self.code, aside))
end

function Process:keep(line)
  table.insert(self.stderr, line)
  if #self.stderr > KEPT then
    table.remove(self.stderr, 1)
  end
end

function Process:overheard(data)
  for i, piece in ipairs(data) do
    self.aside = ((self.aside or "") .. piece):sub(1, 2000)
    if i < #data or (#data == 1 and piece == "") then
      if self.aside:find("%S") then
        self:keep(self.aside)
      end
      self.aside = ""
    end
  end
end

--- Hands the outcome of request `id` to whoever waits for it, or to whoever wants it late.
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

function Process:answered(message)
  local id, refusal = message.id, message.error
  if refusal then
    local data = type(refusal.data) == "table" and refusal.data or {}
    local told = data.details or refusal.message
    local err = config.failure(data.error_code or "INTERNAL_ERROR", told, refusal.code)
    if id == nil then
      self:keep("could not be read: " .. told)
    else
      self:settle(id, err)
    end
  elseif id ~= nil then
    self:settle(id, nil, message.result or {})
  end
end

--- Asks the daemon something. Never waits.
---@param method string
---@param params table
---@param done fun(err?: lofi.Error, result?: table) called once
---@param late? fun(result: table) called with an answer that came after the time was up
function Process:request(method, params, done, late)
  self.last = self.last + 1
  local id = self.last
  local message = { jsonrpc = "2.0", id = id, method = method, params = params }
  local ok, line = pcall(encode, message)
  if not ok then
    vim.schedule(function()
      done(config.failure("INVALID_PARAMS", "This cannot be sent: " .. line, -32602))
    end)
    return
  end
  local entry = { done = done, late = late }
  entry.hold = clock.after(config.options.timeout_ms, function()
    entry.overdue = true
    local text = "The daemon has not answered %s within %.3g s."
    local told = text:format(method, config.options.timeout_ms / 1000)
    done(config.failure("DAEMON_TIMEOUT", told))
  end)
  self.waiting[id] = entry
  -- Where the process has just ended this fails; its exit then settles the request.
  pcall(vim.fn.chansend, self.job, line .. "\n")
end

--- Asks it to end, by closing its input; kills it if it does not.
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

--- Kills it. Its exit is told as one that was asked for.
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
