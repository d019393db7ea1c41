--- Tests in a real editor: each is a function, what it says goes to standard output, and the editor
--- ends with 1 where one failed.
local M = {}

local uv = vim.uv or vim.loop
local tests = {}
local here = vim.fn.fnamemodify(debug.getinfo(1, "S").source:sub(2), ":p:h")

M.root = vim.fn.fnamemodify(here, ":h:h")
M.folder = vim.fn.tempname()
vim.fn.mkdir(M.folder, "p")
M.log = M.folder .. "/log"

--- The command and the environment of the scripted daemon.
M.scripted = {
  cmd = { vim.env.LOFI_TEST_PYTHON or "python3", here .. "/scripted.py" },
  env = { LOG = M.log, TRACKS = M.folder },
}

function M.test(name, fn)
  table.insert(tests, { name = name, fn = fn })
end

function M.equal(got, expected, what)
  if not vim.deep_equal(got, expected) then
    local text = "%s: got %s, expected %s"
    error(text:format(what or "it", vim.inspect(got), vim.inspect(expected)), 2)
  end
end

function M.has(text, part)
  if not tostring(text):find(part, 1, true) then
    error(("%q is not in %q"):format(part, tostring(text)), 2)
  end
end

--- Waits until `is()` holds.
function M.wait(is, what, ms)
  if not vim.wait(ms or 10000, is, 5) then
    error("waited in vain for " .. (what or "it"), 2)
  end
end

--- Milliseconds on a clock that only goes forward.
function M.now()
  return uv.hrtime() / 1e6
end

--- Ends daemon and player, and waits for what they have to say about it.
function M.end_all()
  local lofi, notify = package.loaded["lofi"], vim.notify
  if not lofi then
    return
  end
  local gone = not lofi.is_daemon_running()
  vim.notify = function() end
  lofi.on("daemon_exit", function()
    gone = true
  end)
  lofi.stop_playing()
  lofi.force_stop()
  M.wait(function()
    return gone
  end, "the daemon's end")
  vim.notify = notify
end

--- A new plugin, as after the editor's start, with the scripted daemon unless told otherwise.
function M.fresh(options)
  M.end_all()
  for name in pairs(package.loaded) do
    if name == "lofi" or name:find("^lofi%.") then
      package.loaded[name] = nil
    end
  end
  vim.fn.delete(M.log)
  local lofi = require("lofi")
  lofi.setup(vim.tbl_deep_extend("force", M.scripted, { auto_play = false }, options or {}))
  return lofi
end

--- What the scripted daemon was sent.
function M.received()
  return vim.fn.filereadable(M.log) == 1 and vim.fn.readfile(M.log) or {}
end

function M.alive(pid)
  local file = io.open(("/proc/%d/stat"):format(pid))
  local state = file and file:read("*a"):match("%) (%a)")
  if file then
    file:close()
  end
  return state ~= nil and state ~= "Z"
end

--- What is shown to the user while `fn` runs and until `is()` holds.
function M.shown(fn, is)
  local texts, notify = {}, vim.notify
  vim.notify = function(text)
    table.insert(texts, text)
  end
  local fine, err = pcall(function()
    fn()
    M.wait(function()
      return is(texts)
    end, "what is shown")
  end)
  vim.notify = notify
  if not fine then
    error(err .. "; shown was " .. vim.inspect(texts), 2)
  end
  return texts
end

--- Calls `ask(done)` and waits for what `done` gets.
function M.outcome(ask, ms)
  local got
  ask(function(err, result)
    assert(not got, "called twice")
    got = { err = err, result = result }
  end)
  M.wait(function()
    return got
  end, "an outcome", ms)
  return got.err, got.result
end

--- Runs all tests and leaves the editor. With `last` it is killed, once that has been seen to.
---@param last? fun()
function M.run(last)
  local failed = 0
  for _, test in ipairs(tests) do
    local began = M.now()
    local fine, err = xpcall(test.fn, debug.traceback)
    failed = failed + (fine and 0 or 1)
    local text = "%s %5.0f ms  %s\n"
    io.stdout:write(text:format(fine and "ok  " or "FAIL", M.now() - began, test.name))
    if not fine then
      io.stdout:write(tostring(err) .. "\n")
    end
  end
  if last and failed == 0 then
    last()
  else
    M.end_all()
  end
  vim.fn.delete(M.folder, "rf")
  io.stdout:write(("%d passed, %d failed\n"):format(#tests - failed, failed))
  io.stdout:flush()
  if last and failed == 0 then
    uv.kill(vim.fn.getpid(), "sigkill")
  end
  vim.cmd(failed == 0 and "qall!" or "cquit 1")
end

return M
