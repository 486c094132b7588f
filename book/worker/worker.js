// The announcement's Worker with today's binding: env.AI needs no import, and a stream is a response's body.
export default {
  async fetch(request, env) {
    const { searchParams } = new URL(request.url);
    const prompt = searchParams.get("prompt") ?? "What is grouped query attention";
    const stream = await env.AI.run("@cf/mistral/mistral-7b-instruct-v0.1", { prompt, stream: true });
    return new Response(stream, { headers: { "content-type": "text/event-stream" } });
  },
};
