// What stream-app knows of a user, from Node:
//
//   npm ci --ignore-scripts
//   REDIS_URL=redis://localhost:6379 node lookup.js USER [NOW_MS]
//
// prints {"partition", "weights", "segments", "next"} as JSON; the last three are null for an unknown user.
import { createClient } from 'redis';

// The partition of Kafka's default partitioner: murmur2 of the key's UTF-8, as in its Java client.
function partitionOf(userId, partitions) {
  const data = Buffer.from(userId, 'utf8');
  const M = 0x5bd1e995;
  const whole = data.length - (data.length % 4);
  let h = 0x9747b28c ^ data.length;
  for (let i = 0; i < whole; i += 4) {
    let k = Math.imul(data.readInt32LE(i), M);
    k ^= k >>> 24;
    h = Math.imul(h, M) ^ Math.imul(k, M);
  }
  if (whole < data.length) {
    for (let i = data.length - 1; i >= whole; i--) h ^= data[i] << (8 * (i - whole));
    h = Math.imul(h, M);
  }
  h ^= h >>> 13;
  h = Math.imul(h, M);
  h ^= h >>> 15;
  return (h & 0x7fffffff) % partitions;
}

// [name, number, name, number, ...] as an object. Numbers come as strings that hold a double exactly.
function byName(flat) {
  return Object.fromEntries(inPairs(flat));
}

function inPairs(flat) {
  return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], Number(flat[2 * i + 1])]);
}

function weights([now, types]) {
  return {
    now,
    types: Object.fromEntries(
      types.map(([type, total, labels, assets]) => [
        type,
        { total: Number(total), labels: byName(labels), assets: byName(assets) },
      ]),
    ),
  };
}

function segments([now, rows]) {
  return {
    now,
    segments: rows.map(([segment_id, type, exits_at, labels, score]) =>
      type === 'base'
        ? { segment_id, type, exits_at }
        : { segment_id, type, exits_at, labels, score: Number(score) },
    ),
  };
}

function next([scored_at, model_version, categories, recommendations]) {
  return {
    scored_at,
    model_version,
    categories: inPairs(categories).map(([label, score]) => ({ label, score })),
    recommendations: recommendations.map(([event_type, asset_id, labels, growth, base]) => ({
      event_type,
      asset_id,
      labels,
      growth_weight: Number(growth),
      base_weight: Number(base),
    })),
  };
}

const [userId, given] = process.argv.slice(2);
const redis = createClient({ url: process.env.REDIS_URL });
await redis.connect();
try {
  // Once for the life of an app: how the state is laid out, and whether the functions fit it.
  const [partitions, clock, library] = await redis.hmGet('sa:meta', ['partitions', 'clock', 'functions']);
  if ((await redis.fCallRo('sa_version', { keys: [], arguments: [] })) !== library) {
    throw new Error(`expected the function library ${library} of sa:meta, got another`);
  }

  const partition = partitionOf(userId, Number(partitions));
  const profile = `sa:{${partition}}:profile:${userId}`;
  const scores = `sa:{${partition}}:next:${userId}`;
  // '' is the server's time; with the event clock "now" is what the replay has reached.
  const now = given ?? (clock === 'event' ? await redis.hGet(`sa:{${partition}}:wm`, 'stream_time_ms') : '');

  // Sent together: one round trip.
  const [w, s, n] = await Promise.all([
    redis.fCallRo('sa_weights', { keys: [profile], arguments: [now] }),
    redis.fCallRo('sa_segments', { keys: [profile], arguments: [now] }),
    redis.fCallRo('sa_next', { keys: [profile, scores], arguments: [now] }),
  ]);
  console.log(
    JSON.stringify({ partition, weights: w && weights(w), segments: s && segments(s), next: n && next(n) }),
  );
} finally {
  await redis.close();
}
