#!lua flags=allow-oom
-- include: clock records queues job_states
-- Delete up to 100 records that ended more than keep_s ago.
-- ARGV: prefix, keep_s -> the number of deleted records.

return transaction(function()
  local expired = redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', text(now - ARGV[2]), 'LIMIT', 0, 100)
  for _, job_id in ipairs(expired) do
    redis.call('ZREM', index_key(job_id, get('state', job_id)), job_id)
    count_state(job_id, get('state', job_id), -1)
    redis.call('ZREM', P .. 'ended', job_id)
    redis.call('ZREM', P .. 'callbacks', job_id)
    redis.call('DEL', job_key(job_id), ended_key(job_id))
  end
  return #expired
end)
