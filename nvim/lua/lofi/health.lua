--- :checkhealth lofi
local config = require("lofi.config")
local daemon = require("lofi.daemon")
local player = require("lofi.player")
local process = require("lofi.process")

local uv = vim.uv or vim.loop

local M = {}

local says = vim.health or {}
if not (says.start or says.report_start) then
  says = require("health")
end
local start = says.start or says.report_start
local ok = says.ok or says.report_ok
local info = says.info or says.report_info
local warn = says.warn or says.report_warn
local bad = says.error or says.report_error

--- How long (ms) to wait for the daemon's responses.
local PATIENCE = 20000

local function check_editor()
  start("Neovim")
  local v = vim.version()
  local text = ("Neovim %d.%d.%d"):format(v.major, v.minor, v.patch)
  if vim.fn.has("nvim-0.9") == 1 then
    ok(text)
  else
    warn(text .. " is older than 0.9", { "Commands may work, but this version is not supported." })
  end
end

local function describe(b)
  local parts = { ("%s (%s): %s"):format(b.type, b.name, b.status) }
  if b.device then
    table.insert(parts, b.device)
  end
  if b.dtype then
    table.insert(parts, b.dtype)
  end
  if b.model_version then
    table.insert(parts, b.model_version)
  end
  return table.concat(parts, ", ")
end

--- A variable of the daemon's environment.
local function variable(name)
  return config.environment()[name] or vim.env[name]
end

--- The user's cache folder.
local function caches()
  if vim.fn.has("win32") == 1 then
    return variable("LOCALAPPDATA") or uv.os_homedir()
  elseif vim.fn.has("mac") == 1 then
    return uv.os_homedir() .. "/Library/Caches"
  end
  return variable("XDG_CACHE_HOME") or (uv.os_homedir() .. "/.cache")
end

--- Free bytes on the disk of `folder`, which need not exist yet.
local function free(folder)
  while not uv.fs_stat(folder) do
    local above = vim.fn.fnamemodify(folder, ":h")
    if above == folder then
      return math.huge
    end
    folder = above
  end
  local disk = uv.fs_statfs(folder)
  return disk and disk.bavail * disk.bsize or math.huge
end

local function gigabytes(bytes)
  return ("%.1f GB"):format(bytes / 1e9)
end

--- Reports a backend that is not installed, and whether there is room for it.
local function check_absent(b)
  local hub = variable("HF_HOME") or (uv.os_homedir() .. "/.cache/huggingface")
  local size, room = b.size_bytes or 0, free(variable("HF_HUB_CACHE") or hub)
  local way = (":LofiDownload %s downloads %s"):format(b.type, gigabytes(size))
  if room < size then
    warn(describe(b), { ("%s, but only %s are free"):format(way, gigabytes(room)) })
  else
    info(("%s; %s"):format(describe(b), way))
  end
end

local function check_tracks()
  start("Tracks")
  local own = caches() .. "/lofi.nvim" .. (vim.fn.has("win32") == 1 and "/cache" or "")
  local folder = (variable("LOFI_CACHE_PATH") or own) .. "/tracks"
  local most = tonumber(variable("LOFI_CACHE_MAX_MB")) or 500
  local files, bytes = vim.fn.glob(folder .. "/*.wav", true, true), 0
  for _, file in ipairs(files) do
    bytes = bytes + math.max(0, vim.fn.getfsize(file))
  end
  ok(("%d tracks, %.0f of %d MB, in %s"):format(#files, bytes / 1e6, most, folder))
end

--- Starts a daemon for this check alone.
local function check_daemon()
  start("Daemon")
  info("command: " .. table.concat(config.command(), " "))
  local pong, backends, failed
  local child, err = process.start(function() end, function() end)
  if not child then
    return bad(err.message)
  end
  child:request("ping", vim.empty_dict(), function(why, result)
    pong, failed = result, failed or why
  end)
  child:request("get_backends", vim.empty_dict(), function(why, result)
    backends, failed = result, failed or why
  end)
  vim.wait(PATIENCE, function()
    return failed or (pong and backends)
  end, 10)
  child:stop()
  if pong then
    ok("responds; version " .. tostring(pong.version))
  end
  if failed or not pong then
    bad(failed and failed.message or "no response.", child.stderr)
  end
  for _, b in ipairs(backends and backends.backends or {}) do
    if b.status == "ready" then
      ok(describe(b))
    elseif b.status == "error" then
      warn(describe(b), { b.error or "the reason is unknown" })
    elseif b.status == "not_installed" then
      check_absent(b)
    else
      info(describe(b))
    end
  end
  if #daemon.stderr() > 0 then
    info("log of this editor's daemon:\n" .. table.concat(daemon.stderr(), "\n"))
  end
end

local function check_player()
  start("Player")
  local command = player.command()
  if command then
    ok(table.concat(command, " "))
  else
    info("no player found; install mpv or ffmpeg, or set `player`")
  end
end

function M.check()
  check_editor()
  check_daemon()
  check_tracks()
  check_player()
end

return M
