// Receive callbacks: node receive.mjs PORT SECRET_FILE. Needs only Node.
// Prints one line for each job that has ended. Refuses wrong signatures, old callbacks and replays.
import { createHmac, timingSafeEqual } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";

const TOLERANCE_S = 300; // the greatest difference between the clocks of worker and receiver
const MAX_BYTES = 8 << 20; // the greatest body that is read
const [port, secretFile] = process.argv.slice(2);
const secret = readFileSync(secretFile, "utf8").trim();
const seen = new Map(); // signature -> time of arrival

// Return the status that refuses this callback, or 0 for a genuine and new one.
function refusal(timestamp, signature, body) {
  const expected = Buffer.from(`sha256=${createHmac("sha256", secret).update(`${timestamp}.`).update(body).digest("hex")}`);
  const given = Buffer.from(signature);
  if (given.length !== expected.length || !timingSafeEqual(given, expected)) return 401;
  const now = Date.now() / 1000;
  if (!(Math.abs(now - Number(timestamp)) <= TOLERANCE_S)) return 401;
  // A callback that is older than this is refused by its timestamp.
  for (const [each, at] of seen) if (now - at > 2 * TOLERANCE_S) seen.delete(each);
  if (seen.has(signature)) return 409;
  seen.set(signature, now);
  return 0;
}

const server = createServer(async (request, response) => {
  const parts = [];
  let size = 0;
  for await (const part of request) {
    if ((size += part.length) > MAX_BYTES) return request.destroy();
    parts.push(part);
  }
  const body = Buffer.concat(parts);
  const { "x-ssvm-timestamp": timestamp = "", "x-ssvm-signature-v2": signature = "" } = request.headers;
  const status = refusal(timestamp, signature, body);
  if (!status) {
    const record = JSON.parse(body);
    // It may arrive twice: job_id and the number of the last attempt identify the end of a job.
    console.log(record.job_id, record.state);
  }
  response.writeHead(status || 204).end(); // the worker sends a refused one again, with a new timestamp
});
server.listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}/`));
