--- Jobs and downloads, and the callbacks that wait for them.
local config = require("lofi.config")
local daemon = require("lofi.daemon")
local events = require("lofi.events")
local progress = require("lofi.progress")

---@class lofi.Request
---@field prompt string a description, 1 to 1000 characters
---@field duration_sec? integer 5 to 240 (musicgen: 120)
---@field backend? string "ace_step" or "musicgen"
---@field seed? integer random if nil
---@field priority? string "normal" or "high"
---@field inference_steps? integer ace_step: 1 to 200
---@field scheduler? string ace_step: "euler", "heun" or "pingpong"
---@field guidance_scale? number ace_step: 1 to 30

---@class lofi.Track the fields of generation_complete
---@field track_id string
---@field path string
---@field duration_sec number
---@field sample_rate integer
---@field prompt string
---@field seed integer
---@field backend string
---@field model_version string
---@field generation_time_sec number
---@field cached? boolean

---@class lofi.Job
---@field track_id string
---@field prompt string
---@field duration_sec integer
---@field seed integer
---@field backend string
---@field status string "generating", "queued" or "cached"
---@field priority string
---@field percent integer
---@field current_step? integer
---@field total_steps? integer
---@field eta_sec? number

local M = {}

---@type lofi.Track?
M.last_track = nil

--- Jobs in the order of their arrival. Besides the fields of `lofi.Job` they hold `process` and
--- `waiting`, the callbacks.
local jobs = {}

--- Requests for a track without a response so far.
local unanswered = {}

--- Tracks that completed before the response to their request, by id.
local early = {}

--- Downloads by backend: `process`, `percent`, `waiting`.
local downloads = {}

--- The callback of requests without one: shows the error.
local function show_error(err)
  if err and err.code ~= "GENERATION_CANCELLED" then
    vim.notify("lofi: " .. err.message, vim.log.levels.ERROR)
  end
end

local function call_all(waiting, err, result)
  for _, done in ipairs(waiting) do
    events.guard("a callback", done, err, vim.deepcopy(result))
  end
end

local function job_of(track_id)
  for index, job in ipairs(jobs) do
    if job.track_id == track_id then
      return job, index
    end
  end
end

--- Jobs in the order they run: the running one, high priority, normal priority.
local function line()
  local sorted = {}
  for _, wanted in ipairs({ "running", "high", "normal" }) do
    for _, job in ipairs(jobs) do
      local is = job.status ~= "queued" and "running" or job.priority
      if is == wanted then
        table.insert(sorted, job)
      end
    end
  end
  return sorted
end

local function show()
  local queue, fetched = line(), {}
  for backend, download in pairs(downloads) do
    table.insert(fetched, { backend = backend, percent = download.percent })
  end
  progress.show(queue[1], #queue - 1, fetched)
end

--- Removes a job. The next one counts as running from now on.
local function close(track_id, err, track)
  local job, index = job_of(track_id)
  if job then
    table.remove(jobs, index)
    local next_one = line()[1]
    if next_one then
      next_one.status = "generating"
    end
    call_all(job.waiting, err, track)
  end
  show()
end

local function cancelled(message)
  return config.failure("GENERATION_CANCELLED", message)
end

local notes = {}

function notes.generation_progress(p)
  local job = job_of(p.track_id)
  if job then
    for _, other in ipairs(jobs) do
      other.status = "queued"
    end
    job.status, job.percent = "generating", p.percent
    job.current_step, job.total_steps, job.eta_sec = p.current_step, p.total_steps, p.eta_sec
    show()
  end
  events.emit("generation_progress", p)
end

function notes.generation_complete(p)
  M.last_track = p
  if #unanswered > 0 then
    early[p.track_id] = p
  end
  close(p.track_id, nil, p)
  events.emit("generation_complete", p)
end

function notes.generation_error(p)
  close(p.track_id, config.failure(p.code, p.message))
  events.emit("generation_error", p)
end

function notes.generation_cancelled(p)
  close(p.track_id, cancelled("The track was cancelled."))
  events.emit("generation_cancelled", p)
end

function notes.download_progress(p)
  if downloads[p.backend] then
    downloads[p.backend].percent = math.floor(p.overall_percent or 0)
    show()
  end
  events.emit("download_progress", p)
end

local function fetched(p, err, event)
  local download = downloads[p.backend]
  downloads[p.backend] = nil
  if download then
    call_all(download.waiting, err, { backend = p.backend, already_installed = false })
  end
  show()
  events.emit(event, p)
end

function notes.download_complete(p)
  fetched(p, nil, "download_complete")
end

function notes.download_error(p)
  fetched(p, config.failure(p.code, p.message), "download_error")
end

daemon.on_note = function(method, params)
  if notes[method] then
    notes[method](params)
  end
end

daemon.on_lost = function(process)
  local err = process:lost()
  for _, job in ipairs(vim.list_slice(jobs)) do
    if job.process == process then
      close(job.track_id, err)
      local params = { track_id = job.track_id, code = err.code, message = err.message }
      if process.stopping then
        params = { track_id = job.track_id, at_step = job.current_step or 0 }
        params.total_steps = job.total_steps or 0
      end
      events.emit(process.stopping and "generation_cancelled" or "generation_error", params)
    end
  end
  for backend, download in pairs(vim.tbl_extend("force", {}, downloads)) do
    if download.process == process then
      fetched({ backend = backend, code = err.code, message = err.message }, err, "download_error")
    end
  end
end

--- Adds an accepted request to the jobs.
local function accept(sent, answer)
  local p = sent.params
  local job = job_of(answer.track_id)
  if job then
    table.insert(job.waiting, sent.done)
    job.priority = p.priority == "high" and "high" or job.priority
  else
    job = {
      track_id = answer.track_id,
      prompt = p.prompt,
      duration_sec = p.duration_sec,
      seed = answer.seed,
      backend = answer.backend,
      status = answer.status,
      priority = p.priority or "normal",
      percent = 0,
      process = sent.process,
      waiting = { sent.done },
    }
    table.insert(jobs, job)
  end
  show()
  events.emit("generation_start", {
    track_id = answer.track_id,
    prompt = p.prompt,
    duration_sec = p.duration_sec,
    seed = answer.seed,
    position = answer.position,
    backend = answer.backend,
  })
  local track = early[answer.track_id]
  if track then
    close(track.track_id, nil, track)
  end
  if sent.cancel then
    M.cancel(answer.track_id, sent.cancel)
  end
end

--- Requests a track. `done` is called once, with an error or with the track.
---@param request string|lofi.Request
---@param done? fun(err?: lofi.Error, track?: lofi.Track)
---@return boolean sent whether a request was sent
function M.generate(request, done)
  done = done or show_error
  local params, err = config.params(request)
  if not params then
    vim.schedule(function()
      done(err)
    end)
    return false
  end
  local sent = { params = params, done = done }
  table.insert(unanswered, sent)
  sent.process = daemon.request("generate", params, function(failed, answer)
    if not failed then
      accept(sent, answer)
    end
    unanswered = vim.tbl_filter(function(other)
      return other ~= sent
    end, unanswered)
    if #unanswered == 0 then
      early = {}
    end
    if failed then
      call_all({ done, sent.cancel }, failed)
    end
  end, function(answer)
    -- The caller has been told of a timeout, so the track is not needed any more.
    if not job_of(answer.track_id) then
      daemon.request("cancel", { track_id = answer.track_id }, function() end)
    end
  end)
  return sent.process ~= nil
end

--- Cancels a track, by default the running one.
---@param track_id? string
---@param done? fun(err?: lofi.Error, result?: table)
---@return boolean sent false if there is nothing to cancel
function M.cancel(track_id, done)
  done = done or show_error
  local first = line()[1]
  if not track_id and not first and unanswered[1] then
    unanswered[1].cancel = done
    return true
  end
  track_id = track_id or (first and first.track_id)
  if not track_id or not daemon.is_running() then
    vim.schedule(function()
      done(config.failure("TRACK_NOT_FOUND", "There is no track to cancel.", -32000))
    end)
    return false
  end
  daemon.request("cancel", { track_id = track_id }, done)
  return true
end

--- Downloads the model of a backend. `done` is called when it is installed, or with an error.
---@param backend string "ace_step" or "musicgen"
---@param done? fun(err?: lofi.Error, result?: table)
---@return boolean sent
function M.download(backend, done)
  done = done or show_error
  local process
  process = daemon.request("download_backend", { backend = backend }, function(err, answer)
    if err then
      done(err)
    elseif answer.already_installed then
      done(nil, { backend = backend, already_installed = true })
    else
      downloads[backend] = downloads[backend] or { process = process, percent = 0, waiting = {} }
      table.insert(downloads[backend].waiting, done)
      show()
    end
  end)
  return process ~= nil
end

---@return boolean whether any track is being generated, queued or requested
function M.is_generating()
  return #jobs > 0 or #unanswered > 0
end

--- The running job, or nil.
---@return lofi.Job?
function M.current()
  local job = line()[1]
  if not job then
    return nil
  end
  local copy = vim.tbl_extend("force", {}, job)
  copy.process, copy.waiting = nil, nil
  return copy
end

--- Ids of all tracks being generated or queued.
---@return string[]
function M.open_tracks()
  return vim.tbl_map(function(job)
    return job.track_id
  end, line())
end

return M
