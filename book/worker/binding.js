// What env.AI is on this machine: run() asks the local service over REST, and hands a stream on as it comes.
export default function (env) {
  return {
    async run(model, inputs) {
      const reply = await fetch(`${env.SERVICE}/client/v4/accounts/local/ai/run/${model}`, {
        method: "POST",
        headers: { "content-type": "application/json", ...(env.TOKEN && { authorization: `Bearer ${env.TOKEN}` }) },
        body: JSON.stringify(inputs),
      });
      if (!reply.ok) {
        const { errors } = await reply.json();
        throw new Error(errors.map((e) => `${e.code}: ${e.message}`).join("; "));
      }
      return inputs.stream ? reply.body : (await reply.json()).result;
    },
  };
}
