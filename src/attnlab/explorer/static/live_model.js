/* The companion in plain JavaScript, to read beside the package: tokenizer.py, rotary.py, cache.py, layers.py and mistral.py
   once more, in this order and with their names, for one text at a time. live.py writes what it runs on: weights in int8, one
   scale a row; everything else is float32. Nothing here knows a page: live.js starts this file as a worker, whose messages are
   at its end.

   A matrix is one typed array, row by row. T tokens of a call, S keys, H query heads, Hkv K/V heads, D head_dim, d d_model. */

const MAX_CHARACTERS = 10_000; // of a text; what comes before its last so many is cut
const MAX_PROMPT = 256; // tokens of it, the first one included
const MAX_TOKENS = 384; // with those that are generated
const N_NEXT = 10; // candidates for the next token

// ---- tokenizer.py: JsonTokenizer, for byte-level BPE -----------------------------------------------------------------

// GPT-2's words. White_Space is what Python's side means by \s; JavaScript's own \s differs from it in two characters.
const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/* Every byte as one visible letter: itself if printable, else the next letter from 256 on. */
function letters_of_bytes() {
  const visible = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte < 173) || byte > 173;
  let hidden = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(visible(byte) ? byte : hidden++));
}

class JsonTokenizer {
  /* layout: what is in tokenizer.json; pieces: a label for every token, as Python's `piece` gives them. */
  constructor(layout, pieces) {
    const { vocab, merges } = layout.model;
    const letters = letters_of_bytes();
    const byte_of = new Map(letters.map((letter, byte) => [letter, byte]));
    const special = new Set(layout.added_tokens.map(({ id }) => id));
    this.pieces = pieces;
    this.vocab_size = pieces.length;
    this.bos_id = vocab["<s>"];
    this.eos_id = vocab["</s>"];
    this.split = new RegExp(`(${layout.pre_tokenizer.pretokenizers[0].pattern.Regex})`);
    this.byte_ids = letters.map((letter) => vocab[letter]);
    this.bytes = []; // by id
    for (const [text, id] of Object.entries(vocab)) {
      this.bytes[id] = special.has(id) ? [] : Array.from(text, (letter) => byte_of.get(letter));
    }
    // a pair of ids, as one number → its place among the merges, and what it becomes
    this.merges = new Map(merges.map(([left, right], rank) => [this.pair(vocab[left], vocab[right]), { rank, id: vocab[left + right] }]));
    this.known = new Map(); // words met before → ids
  }

  pair(left, right) {
    return left * this.vocab_size + right;
  }

  encode(text, bos = true) {
    const ids = bos ? [this.bos_id] : [];
    for (const part of text.split(this.split)) {
      for (const [word] of part.matchAll(WORDS)) ids.push(...this.ids_of_word(word));
    }
    return ids;
  }

  ids_of_word(word) {
    if (!this.known.has(word)) this.known.set(word, this.merge(Array.from(new TextEncoder().encode(word), (byte) => this.byte_ids[byte])));
    return this.known.get(word);
  }

  /* The pair that was merged first in training is merged first here, wherever it stands; then the next. */
  merge(ids) {
    for (;;) {
      let best = null;
      let at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const found = this.merges.get(this.pair(ids[i], ids[i + 1]));
        if (found && (!best || found.rank < best.rank)) [best, at] = [found, i];
      }
      if (!best) return ids;
      const [left, right] = [ids[at], ids[at + 1]];
      const merged = ids.slice(0, at);
      for (let i = at; i < ids.length; i++) {
        if (ids[i] === left && ids[i + 1] === right) {
          merged.push(best.id);
          i++;
        } else merged.push(ids[i]);
      }
      ids = merged;
    }
  }

  /* Special tokens leave nothing; bytes that are no character leave U+FFFD. */
  decode(ids) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(ids.flatMap((id) => this.bytes[id])));
  }
}

// ---- rotary.py ---------------------------------------------------------------------------------------------------------

/* cos and sin of position · theta^(-2i/D), i = 0 … D/2 - 1. */
function rotary_angles(position, head_dim, theta) {
  const angles = Array.from({ length: head_dim / 2 }, (_, i) => position * theta ** ((-2 * i) / head_dim));
  return { cos: angles.map(Math.cos), sin: angles.map(Math.sin) };
}

/* Turn the pairs (i, i + D/2) of the head that begins at x[at], in place. */
function apply_rotary(x, at, { cos, sin }) {
  const half = cos.length;
  for (let i = at; i < at + half; i++) {
    const a = x[i];
    const b = x[i + half];
    x[i] = a * cos[i - at] - b * sin[i - at];
    x[i + half] = b * cos[i - at] + a * sin[i - at];
  }
}

// ---- cache.py ------------------------------------------------------------------------------------------------------------

/* Keys and values of the past, slot = position. With a window it is RollingKVCache: slot = position mod window. */
class KVCache {
  constructor({ n_layers, n_kv_heads, head_dim, window }, max_len) {
    this.slots = window ?? max_len;
    this.width = n_kv_heads * head_dim; // of a token's keys, and of its values
    const room = () => Array.from({ length: n_layers }, () => new Float32Array(this.slots * this.width));
    this.k = room(); // a layer: (slots, Hkv, D)
    this.v = room();
    this.length = 0; // tokens seen
  }

  /* Tokens that are kept. */
  get filled() {
    return Math.min(this.length, this.slots);
  }

  /* Bytes of their keys and values. */
  get nbytes() {
    return 2 * this.k.length * this.filled * this.width * Float32Array.BYTES_PER_ELEMENT;
  }

  /* Take in one token's keys and values. What a full window overwrites, this query and all later ones may not see. */
  update(layer, position, k, v) {
    const at = (position % this.slots) * this.width;
    this.k[layer].set(k, at);
    this.v[layer].set(v, at);
  }

  advance(T) {
    this.length += T;
  }
}

// ---- layers.py -----------------------------------------------------------------------------------------------------------

/* torch's nn.Linear without bias, (out, in) in int8; `in` is a multiple of 4. */
class Linear {
  constructor({ weight, scale }) {
    Object.assign(this, { weight, scale, n_out: scale.length, n_in: weight.length / scale.length });
  }

  /* x (T, in) → (T, out). Four tokens share each weight that is read; a token alone adds up in four sums, which do not wait
     for each other. */
  forward(x, T) {
    const { weight, scale, n_out, n_in } = this;
    const out = new Float32Array(T * n_out);
    for (let o = 0; o < n_out; o++) {
      const row = o * n_in;
      let t = 0;
      for (; t + 4 <= T; t += 4) {
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (let i = 0, at = t * n_in; i < n_in; i++, at++) {
          const w = weight[row + i];
          s0 += w * x[at];
          s1 += w * x[at + n_in];
          s2 += w * x[at + 2 * n_in];
          s3 += w * x[at + 3 * n_in];
        }
        out[t * n_out + o] = s0 * scale[o];
        out[(t + 1) * n_out + o] = s1 * scale[o];
        out[(t + 2) * n_out + o] = s2 * scale[o];
        out[(t + 3) * n_out + o] = s3 * scale[o];
      }
      for (; t < T; t++) {
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (let i = 0, at = t * n_in; i < n_in; i += 4, at += 4) {
          s0 += weight[row + i] * x[at];
          s1 += weight[row + i + 1] * x[at + 1];
          s2 += weight[row + i + 2] * x[at + 2];
          s3 += weight[row + i + 3] * x[at + 3];
        }
        out[t * n_out + o] = (s0 + s1 + s2 + s3) * scale[o];
      }
    }
    return out;
  }
}

class RMSNorm {
  constructor(weight, eps) {
    Object.assign(this, { weight, eps });
  }

  forward(x, T) {
    const d = this.weight.length;
    const out = new Float32Array(T * d);
    for (let start = 0; start < T * d; start += d) {
      let squares = 0;
      for (let i = 0; i < d; i++) squares += x[start + i] ** 2;
      const factor = 1 / Math.sqrt(squares / d + this.eps);
      for (let i = 0; i < d; i++) out[start + i] = this.weight[i] * x[start + i] * factor;
    }
    return out;
  }
}

/* down(silu(gate(x)) · up(x)) */
class SwiGLU {
  constructor(weights, name) {
    for (const proj of ["gate_proj", "up_proj", "down_proj"]) this[proj] = new Linear(weights(`${name}.${proj}.weight`));
  }

  forward(x, T) {
    const gate = this.gate_proj.forward(x, T);
    const up = this.up_proj.forward(x, T);
    for (let i = 0; i < gate.length; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
    return this.down_proj.forward(gate, T);
  }
}

class GroupedQueryAttention {
  constructor(weights, name, config) {
    const { n_heads, n_kv_heads, head_dim } = config;
    Object.assign(this, { n_heads, n_kv_heads, head_dim, group_size: n_heads / n_kv_heads });
    for (const proj of ["q_proj", "k_proj", "v_proj", "o_proj"]) this[proj] = new Linear(weights(`${name}.${proj}.weight`));
  }

  /* rotation: the angles of each of the T positions. on_weights(layer, position, weights) gets a query's weights (H, S). */
  forward(x, T, { rotation, cache, layer, on_weights }) {
    const { n_heads: H, n_kv_heads: Hkv, head_dim: D } = this;
    const q = this.q_proj.forward(x, T); // (T, H, D)
    const k = this.k_proj.forward(x, T); // (T, Hkv, D)
    const v = this.v_proj.forward(x, T); // (T, Hkv, D)
    const out = new Float32Array(T * H * D);
    for (let t = 0; t < T; t++) {
      for (let h = 0; h < H; h++) apply_rotary(q, (t * H + h) * D, rotation[t]);
      for (let h = 0; h < Hkv; h++) apply_rotary(k, (t * Hkv + h) * D, rotation[t]);
      const position = cache.length + t;
      const mine = [t * cache.width, (t + 1) * cache.width];
      cache.update(layer, position, k.subarray(...mine), v.subarray(...mine));
      const weights = new Float32Array(H * (position + 1)); // (H, S), 0 where a window hides the key
      for (let h = 0; h < H; h++) this.attend(q, (t * H + h) * D, h, position, cache, layer, weights, out);
      on_weights?.(layer, position, weights);
    }
    return this.o_proj.forward(out, T);
  }

  /* scaled_dot_product_attention for one query head at one position: its weights, and their mean of the values. */
  attend(q, at, h, position, cache, layer, weights, out) {
    const D = this.head_dim;
    const [keys, values] = [cache.k[layer], cache.v[layer]];
    const kv_head = Math.floor(h / this.group_size); // read in place: nothing is repeated
    const place = (s) => (s % cache.slots) * cache.width + kv_head * D;
    const first = Math.max(0, position + 1 - cache.slots);
    const row = weights.subarray(h * (position + 1), (h + 1) * (position + 1));
    let largest = -Infinity;
    for (let s = first; s <= position; s++) {
      const key = place(s);
      let dot = 0;
      for (let i = 0; i < D; i++) dot += q[at + i] * keys[key + i];
      row[s] = dot / Math.sqrt(D);
      largest = Math.max(largest, row[s]);
    }
    let total = 0;
    for (let s = first; s <= position; s++) total += row[s] = Math.exp(row[s] - largest);
    for (let s = first; s <= position; s++) {
      const value = place(s);
      row[s] /= total;
      for (let i = 0; i < D; i++) out[at + i] += row[s] * values[value + i];
    }
  }
}

/* x + attention(norm(x)), then x + feed_forward(norm(x)) */
class TransformerBlock {
  constructor(weights, name, config) {
    this.attention_norm = new RMSNorm(weights(`${name}.attention_norm.weight`).weight, config.norm_eps);
    this.attention = new GroupedQueryAttention(weights, `${name}.attention`, config);
    this.ffn_norm = new RMSNorm(weights(`${name}.ffn_norm.weight`).weight, config.norm_eps);
    this.feed_forward = new SwiGLU(weights, `${name}.feed_forward`);
  }

  forward(x, T, how) {
    x = added(x, this.attention.forward(this.attention_norm.forward(x, T), T, how));
    return added(x, this.feed_forward.forward(this.ffn_norm.forward(x, T), T));
  }
}

function added(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}

// ---- mistral.py ----------------------------------------------------------------------------------------------------------

class Mistral {
  /* weights(name): { weight, scale } of a matrix in int8, { weight } of a vector. */
  constructor(config, weights) {
    this.config = config;
    this.embed = weights("embed.weight");
    this.blocks = Array.from({ length: config.n_layers }, (_, i) => new TransformerBlock(weights, `blocks.${i}`, config));
    this.norm = new RMSNorm(weights("norm.weight").weight, config.norm_eps);
    this.lm_head = new Linear(weights("lm_head.weight"));
  }

  new_cache(max_len) {
    return new KVCache(this.config, max_len);
  }

  /* Logits (T, vocab) for the token after each of ids, or (vocab) for the last alone. */
  forward(ids, cache, { last_only = false, on_weights } = {}) {
    const [T, d] = [ids.length, this.config.d_model];
    const { head_dim, rope_theta } = this.config;
    const rotation = ids.map((_, t) => rotary_angles(cache.length + t, head_dim, rope_theta));
    let x = new Float32Array(T * d);
    ids.forEach((id, t) => {
      for (let i = 0; i < d; i++) x[t * d + i] = this.embed.weight[id * d + i] * this.embed.scale[id];
    });
    this.blocks.forEach((block, layer) => (x = block.forward(x, T, { rotation, cache, layer, on_weights })));
    cache.advance(T);
    if (last_only) return this.lm_head.forward(this.norm.forward(x.subarray((T - 1) * d), 1), 1);
    return this.lm_head.forward(this.norm.forward(x, T), T);
  }
}

/* What live.py packed: the length of a header, the header, then the tensors, whose places count from the header's end. */
function load_model(bytes) {
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const array = (Kind, at, n) => new Kind(bytes.buffer, 4 + length + at, n);
  const weights = (name) => {
    const { shape: [n_rows, n_columns], at, scale } = header.tensors[name];
    if (scale === undefined) return { weight: array(Float32Array, at, n_rows) };
    return { weight: array(Int8Array, at, n_rows * n_columns), scale: array(Float32Array, scale, n_rows) };
  };
  return { model: new Mistral(header.config, weights), tokenizer: new JsonTokenizer(header.tokenizer, header.pieces) };
}

// ---- record.py and explorer/attention.py: what every head looked at, as the attention explorer takes it ------------------

/* A text that is being read: its ids, the cache, every query's weights, and the logits for what comes next. */
class Reading {
  constructor({ model, tokenizer }) {
    Object.assign(this, { model, tokenizer, ids: [], logits: null });
    this.cache = model.new_cache(MAX_TOKENS);
    this.weights = model.blocks.map(() => []); // layer → position → (H, S)
  }

  take(ids) {
    const on_weights = (layer, position, weights) => (this.weights[layer][position] = weights);
    this.logits = this.model.forward(ids, this.cache, { last_only: true, on_weights });
    this.ids.push(...ids);
  }

  /* The most probable next tokens, the first of them first. */
  next() {
    const largest = this.logits.reduce((a, b) => Math.max(a, b));
    const odds = Array.from(this.logits, (logit) => Math.exp(logit - largest));
    const total = odds.reduce((a, b) => a + b);
    const ids = odds.map((_, id) => id).sort((a, b) => odds[b] - odds[a] || a - b);
    const { pieces, eos_id } = this.tokenizer;
    return ids.slice(0, N_NEXT).map((id) => ({ id, piece: pieces[id], probability: odds[id] / total, ends: id === eos_id }));
  }

  /* What `payload` in attention.py makes of a record; layers as bytes, which need no packing here. */
  record() {
    const { name, n_layers, n_heads, n_kv_heads, window } = this.model.config;
    const tokens = this.ids.map((id) => this.tokenizer.pieces[id]);
    const groups = this.weights.map((rows) => rows.map((row) => group_means(row, n_heads, n_kv_heads)));
    return {
      model_name: name, n_layers, n_heads, n_kv_heads, query_tokens: tokens, key_tokens: tokens,
      cross: false, causal: true, window, thumbnails: null,
      numbers: {
        heads: numbers(this.weights, n_heads, window),
        groups: n_heads > n_kv_heads ? numbers(groups, n_kv_heads, window) : null,
      },
      layers: this.weights.map((rows) => encode(rows, n_heads)),
    };
  }
}

/* (H, S) → (Hkv, S): the mean of the query heads that share a K/V head. */
function group_means(row, n_heads, n_kv_heads) {
  const [S, G] = [row.length / n_heads, n_heads / n_kv_heads];
  const means = new Float32Array(n_kv_heads * S);
  for (let i = 0; i < row.length; i++) means[Math.floor(i / (G * S)) * S + (i % S)] += row[i] / G;
  return means;
}

/* One layer in bytes: head by head, row by row, each row its scale, its first key's weight, and the others' in that scale. */
function encode(rows, n_heads) {
  const T = rows.length;
  const bytes = new Uint8Array((n_heads * T * (T + 3)) / 2);
  let at = 0;
  for (let h = 0; h < n_heads; h++) {
    for (let q = 0; q < T; q++) {
      const row = rows[q].subarray(h * (q + 1), (h + 1) * (q + 1));
      let largest = 2 ** -16;
      for (let k = 1; k <= q; k++) largest = Math.max(largest, row[k]);
      const exponent = Math.min(255, Math.max(0, Math.floor(-16 * Math.log2(largest))));
      const scale = 2 ** (-exponent / 16);
      bytes[at++] = exponent;
      bytes[at++] = Math.round(255 * row[0]);
      for (let k = 1; k <= q; k++) bytes[at++] = Math.min(255, Math.round((255 * row[k]) / scale));
    }
  }
  return bytes;
}

/* What sorts heads, each a mean over the queries that have a choice of keys; layer by layer, head by head. */
function numbers(layers, n_heads, window) {
  const found = { entropy: [], distance: [], first: [], entropy_without_first: [], distance_without_first: [] };
  for (const rows of layers) {
    for (let h = 0; h < n_heads; h++) {
      const of_row = (row, q) => row.subarray(h * (q + 1), (h + 1) * (q + 1));
      const mean = (choices, measure) => {
        const values = rows.map((row, q) => (choices(q) > 1 ? measure(of_row(row, q), q) : null)).filter((v) => v !== null);
        return values.reduce((a, b) => a + b, 0) / (values.length || 1);
      };
      const choices = (q) => Math.min(q + 1, window ?? Infinity);
      const without_first = (q) => (choices(q) > q ? q : choices(q));
      found.first.push(mean(choices, (row) => row[0]));
      found.entropy.push(mean(choices, (row) => entropy(row, 0)));
      found.distance.push(mean(choices, (row) => distance(row, 0)));
      found.entropy_without_first.push(mean(without_first, (row) => entropy(row, 1)));
      found.distance_without_first.push(mean(without_first, (row) => distance(row, 1)));
    }
  }
  return found;
}

/* Of a row from its key `from` on, rescaled to a whole: -Σ w log2 w in bits, and Σ w (query - key) in tokens. */
function entropy(row, from) {
  return sum_of(row, from, (w) => (w > 0 ? -w * Math.log2(w) : 0));
}

function distance(row, from) {
  return sum_of(row, from, (w, k) => w * (row.length - 1 - k));
}

function sum_of(row, from, term) {
  let [total, sum] = [0, 0];
  for (let k = from; k < row.length; k++) total += row[k];
  for (let k = from; k < row.length && total > 0; k++) sum += term(row[k] / total, k);
  return sum;
}

// ---- as a worker: a message { id, act, … } is answered by { id, result } or { id, error } ---------------------------------

function companion_worker(answer) {
  const loaded = {}; // name → model and tokenizer
  let reading = null;

  const acts = {
    load({ name, bytes }) {
      loaded[name] = load_model(bytes);
    },

    /* Begin a text: its last characters and tokens, as many as there is room for. */
    read({ name, text }) {
      const { tokenizer } = loaded[name];
      const characters = Array.from(text.toWellFormed()); // not halves of them
      const kept = characters.slice(-MAX_CHARACTERS).join("");
      const [bos, ...ids] = tokenizer.encode(kept);
      reading = new Reading(loaded[name]);
      const prompt = [bos, ...ids.slice(-(MAX_PROMPT - 1))];
      return {
        ...timed(() => reading.take(prompt)),
        kept, characters: characters.length, kept_characters: Math.min(characters.length, MAX_CHARACTERS), tokens: ids.length, kept_tokens: prompt.length - 1,
      };
    },

    /* Go on with a token: the one chosen, else the most probable. */
    take({ token }) {
      if (reading.ids.length >= MAX_TOKENS) return { full: true };
      return timed(() => reading.take([token ?? reading.next()[0].id]));
    },

    record: () => reading.record(),
  };

  /* Do it, and say how long that took and where the reading stands. */
  function timed(act) {
    const start = performance.now();
    act();
    const seconds = (performance.now() - start) / 1000;
    const { ids, cache, tokenizer } = reading;
    const { slots, length, filled, nbytes } = cache;
    return { seconds, ids: [...ids], text: tokenizer.decode(ids), next: reading.next(), cache: { slots, length, filled, nbytes } };
  }

  return ({ data: { id, act, ...what } }) => {
    try {
      answer({ id, result: acts[act](what) });
    } catch (error) {
      answer({ id, error: error.message });
    }
  };
}

if (globalThis.WorkerGlobalScope) onmessage = companion_worker((message) => postMessage(message));
