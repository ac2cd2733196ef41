#!lua flags=allow-oom
-- include: clock records queues job_states
-- Cancel a queued job, or ask the worker of a running job to stop. Other states stay as they are.
-- A queued job with earlier attempts is due at once, so that a worker removes their leftovers.
-- ARGV: prefix, id, user -> the previous state.

return transaction(function()
  local state = get('state')
  if state == 'queued' or state == 'running' then
    put(id, 'cancel', '1', 'cancelled_by', ARGV[3])
  end
  if state == 'queued' and get('attempts') == '' then
    end_job(id, 'cancelled', 'progress', '')
  elseif state == 'queued' then
    put(id, 'ending', get('ending') == '' and 'cancelled' or get('ending'))
    queue_job(id, 0)
    put(id, 'ready', '0')  -- the caller sends no message, so the reaper must send one at once
  end
  return state
end)
