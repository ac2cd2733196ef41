#!lua flags=allow-oom
-- include: clock records queues job_states
-- Queue a failed or cancelled job again. Other states stay as they are.
-- ARGV: prefix, id, user -> the previous state.

return transaction(function()
  local state = get('state')
  if state ~= 'failed' and state ~= 'cancelled' then return state end
  redis.call('ZREM', P .. 'ended', id)
  redis.call('ZREM', P .. 'callbacks', id)
  put(id, 'tries', '0', 'cancel', '', 'cancelled_by', '', 'ending', '', 'error', '', 'result', '', 'progress', '',
      'retried_by', ARGV[3], 'callback_state', '')
  queue_job(id, 0)
  return state
end)
