// The `openai` package for Node.

const OpenAI = require("openai");

const asked = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: asked.url, apiKey: "none", maxRetries: 0 });
const greedy = { model: "demo", temperature: 0, max_tokens: asked.max_tokens };
const inEvents = { stream: true, stream_options: { include_usage: true } };
const messages = asked.messages;

const used = (usage) => [usage.prompt_tokens, usage.completion_tokens];

function whole(result) {
  const [choice] = result.choices;
  return { text: choice.message?.content ?? choice.text, usage: used(result.usage), finish: choice.finish_reason };
}

async function joined(events) {
  const pieces = [];
  let usage, finish;
  for await (const event of events) {
    for (const choice of event.choices) {
      pieces.push(choice.delta?.content ?? choice.text);
      finish = choice.finish_reason ?? finish;
    }
    usage = event.usage ?? usage;
  }
  return { pieces, text: pieces.join(""), usage: used(usage), finish };
}

async function errorOf(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    const kinds = [];
    for (let kind = error; kind; kind = Object.getPrototypeOf(kind)) kinds.push(kind.constructor.name);
    return { kinds, message: error.message, code: error.code, param: error.param };
  }
}

// The package's own reader of a stream, which puts the message together.
async function collected() {
  const stream = client.chat.completions.stream({ messages, ...greedy, stream_options: { include_usage: true } });
  return whole(await stream.finalChatCompletion());
}

async function main() {
  const { completions } = client;
  const chats = client.chat.completions;
  const tool = { type: "function", function: { name: "weather", parameters: { type: "object", properties: {} } } };
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  const found = {
    models,
    chat: whole(await chats.create({ messages, ...greedy })),
    chat_stream: await joined(await chats.create({ messages, ...greedy, ...inEvents })),
    chat_stream_collected: await collected(),
    completion: whole(await completions.create({ prompt: asked.prompt, ...greedy })),
    completion_stream: await joined(await completions.create({ prompt: asked.prompt, ...greedy, ...inEvents })),
    stopped: (await completions.create({ prompt: asked.prompt, stop: asked.stop, ...greedy })).choices[0].text,
    too_long: await errorOf(completions.create({ prompt: asked.long, ...greedy })),
    tools: await errorOf(chats.create({ messages, tools: [tool], ...greedy })),
  };
  console.log(JSON.stringify(found));
}

main();
