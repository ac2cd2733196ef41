// Queue a job and follow it, without Python: node submit.mjs redis://… ZONE JOB '{"account": "2", …}'
// Prints one line for each change of its state; exits with 0 if it succeeded. Needs: npm install
import { randomUUID } from "node:crypto";
import { createClient } from "redis";

const LANES = { download: "download", upload: "upload", backup: "backup", restore: "backup" };

// A Celery message (protocol 2) is one element of the list that is the queue.
function message(job, request, queue) {
  const id = request.job_id;
  const body = JSON.stringify([[request], {}, {}]);
  return JSON.stringify({
    headers: { lang: "js", task: `ssvm.${job}`, id, root_id: id },
    properties: {
      correlation_id: id,
      delivery_tag: randomUUID(),
      delivery_mode: 2,
      delivery_info: { exchange: "", routing_key: queue },
      body_encoding: "base64",
    },
    "content-type": "application/json",
    "content-encoding": "utf-8",
    body: Buffer.from(body).toString("base64"),
  });
}

const [url, zone, job, fields] = process.argv.slice(2);
const request = { job_id: randomUUID(), ...JSON.parse(fields) };
const queue = `ssvm.${zone}.${LANES[job] ?? "maintenance"}`;
const redis = await createClient({ url }).connect();

// A new group that begins now. A server that must miss nothing always uses one group, and acknowledges.
const events = "ssvm.ledger:events";
const group = `example-${request.job_id}`;
await redis.xGroupCreate(events, group, "$", { MKSTREAM: true });
await redis.lPush(queue, message(job, request, queue));

let state = "";
while (!["succeeded", "failed", "cancelled"].includes(state)) {
  const answer = await redis.xReadGroup(group, "me", { key: events, id: ">" }, { COUNT: 10, BLOCK: 2000, NOACK: true });
  for (const { message: event } of (answer ?? []).flatMap((stream) => stream.messages)) {
    if (event.job_id !== request.job_id) continue;
    state = event.state;
    console.log(JSON.stringify({ job_id: event.job_id, state, outcome: event.outcome ? JSON.parse(event.outcome) : null }));
  }
}
await redis.xGroupDestroy(events, group);
redis.destroy();
process.exitCode = state === "succeeded" ? 0 : 1;
