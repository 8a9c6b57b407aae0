// Small helpers: elements, requests, sizes in words.

export const $ = (id) => document.getElementById(id);

/** Make an element; text is always text, never markup, since names and reports come from files. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Ask the server; throws an Error with the server's one line and status where it refuses. */
export async function ask(path, { method = "GET", body } = {}) {
  const headers = { "X-SlideScribe": "page" };
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const said = typeof content.error === "string" ? content.error : `Refused (${answer.status}).`;
    throw Object.assign(new Error(said), { status: answer.status });
  }
  return content;
}

export function bytesInWords(bytes) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (bytes >= size) return `${(bytes / size).toPrecision(3)} ${unit}`;
  return `${bytes} bytes`;
}

/** The ends of a long name, which tell slides of one case apart. */
export function shortened(name, longest) {
  return name.length <= longest ? name : `${name.slice(0, longest / 2)}…${name.slice(1 - longest / 2)}`;
}

/** A file name that lines may break behind its marks, not amid a word. */
export function breakable(name) {
  return name.split(/(?<=[_/-])/).flatMap((part) => [part, element("wbr")]);
}

export const sleep = (milliseconds) => new Promise((wake) => setTimeout(wake, milliseconds));
