// As announced in November 2023, but for the binding: there the stream went through Response.json.
export default {
  async fetch(request, env) {
    const stream = await env.AI.run("@cf/mistral/mistral-7b-instruct-v0.1", {
      prompt: "What is grouped query attention",
      stream: true,
    });
    return Response.json(stream, { headers: { "content-type": "text/event-stream" } });
  },
};
