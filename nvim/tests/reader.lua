local t = require("harness")
local reader = require("lofi.reader")

--- What a job hands over for these bytes.
local function pieces(bytes)
  return vim.split(bytes, "\n", { plain = true })
end

local messages = {
  { id = 1, result = { status = "ok", text = 'quotes " and \\ and ü 𝄞' } },
  { method = "generation_progress", params = { percent = 5, list = { 1, 2.5 }, empty = "" } },
  { id = 2, error = { code = -32004, message = "full", data = { details = "zehn Stücke" } } },
}
local transcript = ""
for _, message in ipairs(messages) do
  transcript = transcript .. vim.json.encode(message) .. "\n"
end

local function read(...)
  local got, rubbish = {}, {}
  local feed = reader.new(function(m)
    table.insert(got, m)
  end, function(line)
    table.insert(rubbish, line)
  end)
  for _, bytes in ipairs({ ... }) do
    feed(pieces(bytes))
  end
  return got, rubbish
end

t.test("a transcript cut at every byte is read the same", function()
  for cut = 0, #transcript do
    local got, rubbish = read(transcript:sub(1, cut), transcript:sub(cut + 1))
    t.equal(got, messages, "cut at " .. cut)
    t.equal(rubbish, {})
  end
end)

t.test("a transcript cut twice, anywhere, is read the same", function()
  math.randomseed(1)
  for _ = 1, 500 do
    local a, b = math.random(0, #transcript), math.random(0, #transcript)
    a, b = math.min(a, b), math.max(a, b)
    local parts = { transcript:sub(1, a), transcript:sub(a + 1, b), transcript:sub(b + 1) }
    t.equal(read(unpack(parts)), messages, ("cut at %d and %d"):format(a, b))
  end
end)

t.test("a transcript that comes byte by byte is read the same", function()
  t.equal(read(unpack(vim.split(transcript, ""))), messages)
end)

t.test("a message without an end is not read", function()
  t.equal(read(transcript:sub(1, -2)), { messages[1], messages[2] })
end)

t.test("null is nil, in lists too", function()
  t.equal(read('{"id":null,"result":{"a":null,"b":[null]}}\n'), { { result = { b = {} } } })
end)

t.test("rubbish and empty lines are left out, and the rest is read", function()
  local got, rubbish = read("Loading 100%\n\n[1, 2\n" .. transcript .. '"text"\n7\n')
  t.equal(got, messages)
  t.equal(rubbish, { "Loading 100%", "[1, 2", '"text"', "7" })
end)

t.test("a line of a megabyte in pieces is read in good time", function()
  local line = vim.json.encode({ id = 1, result = { blob = ("x"):rep(1e6) } }) .. "\n"
  local parts = {}
  for from = 1, #line, 1000 do
    table.insert(parts, line:sub(from, from + 999))
  end
  local began = t.now()
  local got = read(unpack(parts))
  t.equal(#got[1].result.blob, 1e6)
  assert(t.now() - began < 1000, "it took " .. (t.now() - began))
end)

t.run()
