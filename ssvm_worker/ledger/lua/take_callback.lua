#!lua flags=allow-oom
-- include: clock records queues job_states
-- Lease a callback that is due.
-- ARGV: prefix, job id or '' for any job, seconds of the lease -> the job's id, or ''.

return transaction(function()
  local candidates = ARGV[2] ~= '' and { ARGV[2] }
    or redis.call('ZRANGEBYSCORE', P .. 'callbacks', '-inf', text(now), 'LIMIT', 0, 100)
  for _, job_id in ipairs(candidates) do
    local due = tonumber(redis.call('ZSCORE', P .. 'callbacks', job_id) or nil)
    if get('state', job_id) == '' then
      redis.call('ZREM', P .. 'callbacks', job_id)  -- an administrator deleted the record by hand
    elseif due and due <= now then
      redis.call('ZADD', P .. 'callbacks', text(now + ARGV[3]), job_id)
      return job_id
    end
  end
  return ''
end)
