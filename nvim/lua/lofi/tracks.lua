--- What is being made and fetched, and who waits for it.
local config = require("lofi.config")
local daemon = require("lofi.daemon")
local events = require("lofi.events")
local progress = require("lofi.progress")

---@class lofi.Request
---@field prompt string what it should sound like, 1 to 1000 characters
---@field duration_sec? integer 5 to 240 (musicgen: 120)
---@field backend? string "ace_step" or "musicgen"
---@field seed? integer drawn where nil
---@field priority? string "normal" or "high"
---@field inference_steps? integer ace_step: 1 to 200
---@field scheduler? string ace_step: "euler", "heun" or "pingpong"
---@field guidance_scale? number ace_step: 1 to 30

---@class lofi.Track what generation_complete tells
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

--- Jobs in the order of their arrival. Beside what a `lofi.Job` has they hold `process`, who makes
--- them, and `waiting`, who wants them.
local jobs = {}

--- Requests for a track that have not been answered.
local asked = {}

--- Tracks that came before the answer to a request for them, by their id.
local early = {}

--- Downloads by backend: `process`, `percent`, `waiting`.
local downloads = {}

--- Nobody waits: a failure is shown all the same.
local function complain(err)
  if err and err.code ~= "GENERATION_CANCELLED" then
    vim.notify("lofi: " .. err.message, vim.log.levels.ERROR)
  end
end

local function tell(waiting, err, result)
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

--- Jobs in the order in which they are made: the running one, high ones, the others.
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

--- Takes a job off the list. The next in line is the one that runs from now on.
local function close(track_id, err, track)
  local job, index = job_of(track_id)
  if job then
    table.remove(jobs, index)
    local next_one = line()[1]
    if next_one then
      next_one.status = "generating"
    end
    tell(job.waiting, err, track)
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
  if #asked > 0 then
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
    tell(download.waiting, err, { backend = p.backend, already_installed = false })
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
      local told = { track_id = job.track_id, code = err.code, message = err.message }
      if process.stopping then
        told = { track_id = job.track_id, at_step = job.current_step or 0 }
        told.total_steps = job.total_steps or 0
      end
      events.emit(process.stopping and "generation_cancelled" or "generation_error", told)
    end
  end
  for backend, download in pairs(vim.tbl_extend("force", {}, downloads)) do
    if download.process == process then
      fetched({ backend = backend, code = err.code, message = err.message }, err, "download_error")
    end
  end
end

--- Puts an accepted request among the jobs.
local function accept(ask, answer)
  local p = ask.params
  local job = job_of(answer.track_id)
  if job then
    table.insert(job.waiting, ask.done)
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
      process = ask.process,
      waiting = { ask.done },
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
  if ask.cancel then
    M.cancel(answer.track_id, ask.cancel)
  end
end

--- Asks for a track. `done` is called once, with what went wrong or with the track.
---@param request string|lofi.Request
---@param done? fun(err?: lofi.Error, track?: lofi.Track)
---@return boolean sent whether the daemon was asked
function M.generate(request, done)
  done = done or complain
  local params, err = config.params(request)
  if not params then
    vim.schedule(function()
      done(err)
    end)
    return false
  end
  local ask = { params = params, done = done }
  table.insert(asked, ask)
  ask.process = daemon.request("generate", params, function(failed, answer)
    if not failed then
      accept(ask, answer)
    end
    asked = vim.tbl_filter(function(other)
      return other ~= ask
    end, asked)
    if #asked == 0 then
      early = {}
    end
    if failed then
      tell({ done, ask.cancel }, failed)
    end
  end, function(answer)
    -- Nobody waits for it any more: the daemon need not make it.
    if not job_of(answer.track_id) then
      daemon.request("cancel", { track_id = answer.track_id }, function() end)
    end
  end)
  return ask.process ~= nil
end

--- Cancels a track, or else the one being made.
---@param track_id? string
---@param done? fun(err?: lofi.Error, result?: table)
---@return boolean sent false where nothing is being made
function M.cancel(track_id, done)
  done = done or complain
  local first = line()[1]
  if not track_id and not first and asked[1] then
    asked[1].cancel = done
    return true
  end
  track_id = track_id or (first and first.track_id)
  if not track_id or not daemon.is_running() then
    vim.schedule(function()
      done(config.failure("TRACK_NOT_FOUND", "Nothing is being made.", -32000))
    end)
    return false
  end
  daemon.request("cancel", { track_id = track_id }, done)
  return true
end

--- Fetches the files of a backend. `done` is called when they are there, or with what went wrong.
---@param backend string "ace_step" or "musicgen"
---@param done? fun(err?: lofi.Error, result?: table)
---@return boolean sent
function M.download(backend, done)
  done = done or complain
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

---@return boolean whether anything is being made, waits, or was asked for
function M.is_generating()
  return #jobs > 0 or #asked > 0
end

--- The job that runs, or nil.
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

--- Ids of all tracks that are being made or wait.
---@return string[]
function M.open_tracks()
  return vim.tbl_map(function(job)
    return job.track_id
  end, line())
end

return M
