// Draw every wanted emoji of five open sets at 128 × 128 RGBA: node render.mjs NPM_DIR OUT_DIR
import fs from 'node:fs'
import path from 'node:path'
import { createRequire } from 'node:module'

const [npmDir, outDir] = process.argv.slice(2)
const require = createRequire(path.resolve(npmDir, 'package.json'))
const sharp = require('sharp')
sharp.concurrency(1)

const SIZE = 128
const SETS = {
  flat: 'fluent-emoji-flat', noto: 'noto', line: 'fluent-emoji-high-contrast',
  gradient: 'fluent-emoji', twemoji: 'twemoji',
}
const SKIP = /^(man|woman|person|people)-|oclock|thirty|button|square$|circle$|keycap|input-|-flag|flag-/

const load = (set) =>
  JSON.parse(fs.readFileSync(path.join(npmDir, 'node_modules/@iconify-json', set, 'icons.json')))

function svg(set, name) {
  const icon = set.icons[name]
  const [w, h] = [icon.width ?? set.width ?? 16, icon.height ?? set.height ?? 16]
  return Buffer.from(`<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#111" ` +
    `width="${SIZE}" height="${SIZE}" viewBox="${icon.left ?? 0} ${icon.top ?? 0} ${w} ${h}">${icon.body}</svg>`)
}

const sets = Object.fromEntries(Object.entries(SETS).map(([style, set]) => [style, load(set)]))
const names = Object.keys(sets.flat.icons)
  .filter((name) => !SKIP.test(name) && Object.values(sets).every((set) => set.icons[name])).sort()

fs.mkdirSync(outDir, { recursive: true })
for (const [style, set] of Object.entries(sets)) {
  const file = fs.openSync(path.join(outDir, `${style}.rgba`), 'w')
  for (const name of names)
    fs.writeSync(file, await sharp(svg(set, name)).resize(SIZE, SIZE).ensureAlpha().raw().toBuffer())
  fs.closeSync(file)
}
fs.writeFileSync(path.join(outDir, 'names.json'), JSON.stringify(names))
console.log(`${names.length} names in ${Object.keys(sets).length} styles`)
