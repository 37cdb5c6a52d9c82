// hubsim's page without a browser: loads it from the hub, lets its script draw once into elements
// that hold text and nothing more, and prints what a person would read, one element a line.
//
//   node page.js https://HOST:PORT        (NODE_EXTRA_CA_CERTS names the hub's CA)
'use strict';

// Node 18 tries the first address alone, and the hub listens on 127.0.0.1.
require('node:dns').setDefaultResultOrder('ipv4first');

const hub = process.argv[2];

class Element {
  children = [];
  style = {};
  classList = { add() {} };
  className = '';
  constructor(tag) { this.tag = tag; }
  append(...children) { this.children.push(...children); }
  prepend(...children) { this.children.unshift(...children); }
  replaceChildren(...children) { this.children = children; }
  remove() {}
  addEventListener() {}
  setAttribute(name, value) { this[name] = value; }
  get firstChild() { return this.children[0]; }
  get lastChild() { return this.children.at(-1); }
  set textContent(text) { this.children = [text]; }
  get lines() {
    return this.children.flatMap((child) => (child instanceof Element ? child.lines : [String(child)]));
  }
}

const places = new Map();
const place = (name) => {
  if (!places.has(name)) places.set(name, Object.assign(new Element('div'), { value: '' }));
  return places.get(name);
};
const document = {
  createElement: (tag) => new Element(tag),
  getElementById: place,
  querySelector: place,
};

async function main() {
  const page = await (await fetch(`${hub}/`)).text();
  const [, script] = page.match(/<script>([^]*)<\/script>/);
  // The page polls for ever; it has drawn when it arms its timer for the first time.
  const drawn = new Promise((done) => {
    const from = (path, options) => fetch(hub + path, options);
    new Function('document', 'fetch', 'setTimeout', script)(document, from, done);
  });
  await drawn;
  console.log([...place('link').lines, ...place('devices').lines].join('\n'));
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
