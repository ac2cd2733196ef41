-- Change the state of a job: queue it, start an attempt, end an attempt, end the job.

-- Add an entry to the stream of events. The outcome is JSON, or '' for a job that has not ended.
local function publish_event(job_id, outcome)
  redis.call('XADD', P .. 'events', 'MAXLEN', '~', 50000, '*', 'schema', 1, 'job_id', job_id,
             'job', get('job', job_id),
             'zone', get('zone', job_id), 'lane', get('lane', job_id), 'state', get('state', job_id),
             'attempt', get('attempts', job_id), 'at', text(now), 'outcome', outcome)
end

local function json_field(json, name)
  local ok, value = pcall(cjson.decode, json)
  return ok and type(value) == 'table' and value[name] or nil
end

-- Remove a queued job from its queue, or from the set of jobs that wait for their not_before.
local function leave_queue(job_id)
  if get('not_before', job_id) ~= '' then redis.call('ZREM', P .. 'due', job_id) end
  dequeue(job_id)
end

-- Queue a job, due in delay seconds. The caller sends a Celery message for a job that is due now.
-- Otherwise the reaper sends one, if no message waits in the lane.
local function queue_job(job_id, delay)
  local due, previous = text(now + delay), get('state', job_id)
  if previous == 'queued' then leave_queue(job_id) end
  set_state(job_id, 'queued')
  if tonumber(delay) > 0 then
    put(job_id, 'not_before', due)
    redis.call('ZADD', P .. 'due', due, job_id)
  else
    put(job_id, 'not_before', '', 'ready', text(now))
    enqueue(job_id, lane_queue(job_id))
  end
  if previous ~= 'queued' then publish_event(job_id, '') end
end

-- Claim a job for a worker. Return its id, the fencing token, the number of the attempt, and the kind of job.
local function start_attempt(job_id, worker, host, claim_s, held)
  take_slots(job_id)
  local number = add(job_id, 'attempts', 1)
  add(job_id, 'tries', 1)
  put(job_id, 'held', held or '')
  set_state(job_id, 'running')
  local by = get('retried_by', job_id)
  local attempt = cjson.encode({ worker = worker, host = host, started = text(now), by = by ~= '' and by or nil })
  if number > 20 then put(job_id, 'a' .. number - 20, '') end  -- a record keeps the last 20 attempts
  put(job_id, 'a' .. number, attempt, 'retried_by', '', 'progress', '', 'ready', '', 'not_before', '')
  -- begin.lua clears this field. Until then, the answer may be lost, or the process may fail to start.
  put(job_id, 'handed', '1')
  redis.call('ZADD', P .. 'claims', text(now + claim_s), job_id)
  publish_event(job_id, '')
  return { job_id, number, number, get('job', job_id) }
end

-- End the current attempt: count its bytes, and release the claim, the resource and the slots.
local function end_attempt(job_id, error)
  local field = 'a' .. get('attempts', job_id)
  local ok, attempt = pcall(cjson.decode, get(field, job_id))
  if not ok or type(attempt) ~= 'table' then attempt = {} end
  attempt.ended, attempt.error = text(now), error ~= '' and error or nil
  local moved = finite(json_field(get('progress', job_id), 'moved'))
  if moved then
    attempt.bytes = string.format('%.0f', moved)
    redis.pcall('HINCRBY', P .. 'moved', get('job', job_id) .. ' ' .. get('zone', job_id), attempt.bytes)
  end
  put(job_id, field, cjson.encode(attempt))
  if get('handed', job_id) == '1' then add(job_id, 'tries', -1) end  -- the attempt never started, so it does not count
  put(job_id, 'handed', '')
  redis.call('ZREM', P .. 'claims', job_id)
  release_slots(job_id)
end

-- Add an ended job to the counters of the metrics. These counters never decrease.
local function count_ending(job_id)
  local error_class = tostring(json_field(get('error', job_id), 'error') or '-')
  local place = get('job', job_id) .. ' ' .. get('lane', job_id) .. ' ' .. get('zone', job_id)
  redis.pcall('HINCRBY', P .. 'endings', place .. ' ' .. get('state', job_id) .. ' ' .. error_class, 1)
end

-- End a job in a final state, set one more field, and make its callback due.
local function end_job(job_id, state, field, value)
  if get('state', job_id) == 'queued' then leave_queue(job_id) end
  set_state(job_id, state)
  put(job_id, field, value, 'ending', '')
  redis.call('ZADD', P .. 'ended', text(now), job_id)
  if get('callback_url', job_id) ~= '' then
    put(job_id, 'callback_state', 'pending', 'callback_tries', '0', 'callback_error', '')
    redis.call('ZADD', P .. 'callbacks', text(now), job_id)
  end
  count_ending(job_id)
  publish_event(job_id, state == 'succeeded' and get('result', job_id) or get('error', job_id))
end
