#!lua flags=allow-oom
-- include: clock records queues job_states
-- One round of the reaper: queue jobs of lost workers, queue jobs that have become due, repair limits.
-- A round sooner than every_s after the last one does nothing. So any number of reapers make one.
-- ARGV:
-- - prefix, claim_s, every_s, max_attempts, resend_s
-- - error of a lost attempt, Celery's key prefix, '1' if messages use another broker
-- - limits (store, source, account)
--
-- -> two lists: ids of jobs to wake; ids to wake if their queue has no message, which the caller checks.

return transaction(function()
  local claim_s, every_s, max_attempts = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
  local resend_s, lost_error, celery_prefix, other_broker = tonumber(ARGV[5]), ARGV[6], ARGV[7], ARGV[8] ~= ''
  set_limits(ARGV[9], ARGV[10], ARGV[11])
  local last = finite(redis.call('HGET', P .. 'reaper', 'last'), 0)

  -- The clock jumped back: shift all deadlines by the same amount. Otherwise claims of lost workers last for hours.
  -- Running workers renew their claims.
  local function shift_deadlines(by)
    for _, job_id in ipairs(redis.call('ZRANGE', P .. 'due', 0, -1)) do
      redis.call('ZINCRBY', P .. 'due', text(-by), job_id)
      if get('state', job_id) == 'queued' then put(job_id, 'not_before', text(finite(get('not_before', job_id), now) - by)) end
    end
    for _, job_id in ipairs(redis.call('ZRANGE', P .. 'callbacks', 0, -1)) do
      redis.call('ZINCRBY', P .. 'callbacks', text(-by), job_id)
    end
    for _, job_id in ipairs(redis.call('ZRANGE', P .. 'claims', 0, -1)) do
      redis.call('ZADD', P .. 'claims', text(now + claim_s), job_id)
    end
    redis.call('HSET', P .. 'reaper', 'spare', text(now + claim_s))
  end

  if now < last then shift_deadlines(last - now) end
  if now >= last and now - last < every_s * 0.8 then return { {}, {} } end
  -- No round ran for a while: the broker was away, or all workers were. Workers get the time of one claim to renew.
  if now - last > math.max(claim_s / 2, every_s * 3) then
    redis.call('HSET', P .. 'reaper', 'spare', text(now + claim_s))
  end
  redis.call('HSET', P .. 'reaper', 'last', text(now))

  -- A job without its state: an administrator has deleted the record by hand.
  if now > finite(redis.call('HGET', P .. 'reaper', 'spare'), 0) then
    for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'claims', '-inf', text(now), 'LIMIT', 0, 100)) do
      local running, ending = get('state', job_id) == 'running', get('ending', job_id)
      if running then end_attempt(job_id, lost_error) end
      if not running then
        redis.call('ZREM', P .. 'claims', job_id)
      elseif ending ~= '' then
        end_job(job_id, ending, 'progress', '')
      else
        put(job_id, 'error', lost_error)
        if get('cancel', job_id) == '1' then put(job_id, 'ending', 'cancelled')
        elseif finite(get('tries', job_id), 0) >= max_attempts then put(job_id, 'ending', 'failed') end
        queue_job(job_id, 0)
        to_wake[#to_wake + 1] = job_id
      end
    end
  end

  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', text(now), 'LIMIT', 0, 100)) do
    if get('state', job_id) == 'queued' then
      queue_job(job_id, 0)
      to_wake[#to_wake + 1] = job_id
    else
      redis.call('ZREM', P .. 'due', job_id)
    end
  end

  -- Find jobs that have been ready for resend_s in lanes without a message.
  local to_check = {}
  for _, queue in ipairs(redis.call('SMEMBERS', P .. 'queues')) do
    local lane = string.match(queue, '^lane:(.*)$')
    if not lane then
      repair_limit(queue)
    elseif other_broker or redis.call('LLEN', celery_prefix .. 'ssvm.' .. (string.gsub(lane, ' ', '.'))) == 0 then
      for _, job_id in ipairs(redis.call('ZRANGE', all_key(queue), 0, 99)) do
        local since = finite(get('ready', job_id), 0)
        if get('state', job_id) ~= 'queued' then
          redis.call('ZREM', all_key(queue), job_id)
        elseif now - since > resend_s or since > now then  -- since > now: the clock jumped back
          put(job_id, 'ready', text(now))
          table.insert(other_broker and to_check or to_wake, job_id)
        end
      end
    end
  end
  return { to_wake, to_check }
end)
