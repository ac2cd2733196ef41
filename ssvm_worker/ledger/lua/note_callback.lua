#!lua flags=allow-oom
-- include: clock records queues job_states
-- Store the outcome of one try of a callback.
-- ARGV: prefix, id, state (pending, delivered, failed), error, seconds until the next try.

return transaction(function()
  if get('callback_state') ~= 'pending' then return 0 end
  add(id, 'callback_tries', 1)
  put(id, 'callback_state', ARGV[3], 'callback_error', ARGV[4])
  if ARGV[3] == 'pending' then return redis.call('ZADD', P .. 'callbacks', text(now + ARGV[5]), id) end
  return redis.call('ZREM', P .. 'callbacks', id)
end)
