#!lua flags=allow-oom
-- include: clock records queues job_states
-- End a queued job without attempts as failed. Other jobs stay as they are.
-- ARGV: prefix, id, error -> 1 if the job has ended, else 0.

return transaction(function()
  if get('state') ~= 'queued' or get('attempts') ~= '' then return 0 end
  end_job(id, 'failed', 'error', ARGV[3])
  return 1
end)
