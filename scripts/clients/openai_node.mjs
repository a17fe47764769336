// openai-node: chat, completions, embeddings, models, streams, tools, errors.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const model = process.env.OCTAVO_MODEL;
const client = new OpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, temperature: 0, max_tokens: 16 };

const ids = [];
for await (const entry of client.models.list()) ids.push(entry.id);
assert.ok(ids.includes(model));
assert.equal((await client.models.retrieve(model)).id, model);

const whole = await client.chat.completions.create({ messages, ...greedy });
const text = whole.choices[0].message.content;
assert.ok(text.length > 0 && whole.usage.completion_tokens > 0);
const stream = await client.chat.completions.create({
  messages,
  stream: true,
  stream_options: { include_usage: true },
  ...greedy,
});
let streamed = "";
let usage;
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.total_tokens, whole.usage.total_tokens);

const runner = client.chat.completions.stream({ messages, ...greedy });
assert.equal(await runner.finalContent(), text);

const completion = await client.completions.create({ model, prompt: "Hello", max_tokens: 4, n: 2, seed: 1 });
assert.equal(completion.choices.length, 2);

const vectors = await client.embeddings.create({ model, input: ["a", "b"] });
const plain = await client.embeddings.create({ model, input: ["a", "b"], encoding_format: "float" });
assert.deepEqual(
  vectors.data.map((entry) => [...entry.embedding]),
  plain.data.map((entry) => entry.embedding),
);

const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      parameters: { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] },
    },
  },
];
const called = await client.chat.completions.create({
  messages,
  tools,
  tool_choice: { type: "function", function: { name: "weather" } },
  ...greedy,
  max_tokens: 64,
});
const call = called.choices[0].message.tool_calls[0];
assert.equal(call.function.name, "weather");
assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));

await assert.rejects(client.chat.completions.create({ messages, ...greedy, temperature: 9 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});
await assert.rejects(client.models.retrieve("another"), OpenAI.NotFoundError);

const controller = new AbortController();
const endless = await client.completions.create(
  { model, prompt: "Hello", max_tokens: 500, ignore_eos: true, stream: true },
  { signal: controller.signal },
);
for await (const _ of endless) controller.abort();

const { version } = JSON.parse(readFileSync(new URL("node_modules/openai/package.json", import.meta.url)));
console.log(`openai-node ${version}`);
