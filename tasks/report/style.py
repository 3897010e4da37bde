"""How the page looks: on a phone, on a desk, on paper, by day and by night. No font, no colour comes from elsewhere."""

CSS = """
:root{--paper:#fff;--ink:#1c1f23;--quiet:#646b75;--rule:#dfe2e6;--soft:#f5f6f8;--train:#2f5f9e;--held:#c05a1c;--warn:#b3261e;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e4e6e9;--quiet:#9aa2ac;--rule:#31363c;--soft:#1c2024;--train:#7fb0ee;
--held:#f0945a;--warn:#ff8a80}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:64rem;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:2rem;line-height:1.15;margin:.1rem 0 .5rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;margin:3rem 0 .75rem;padding-top:.9rem;border-top:1px solid var(--rule);letter-spacing:-.005em}
h3{font-size:1rem;margin:1.75rem 0 .5rem}
p{margin:.5rem 0;max-width:44rem}
a{color:inherit;text-underline-offset:.15em;text-decoration-color:var(--quiet)}
small,.quiet,.note,.legend,.axis{color:var(--quiet);font-size:.8125rem;line-height:1.4}
.over{color:var(--quiet);font-size:.8125rem;margin:0}
.lead{font-size:1.0625rem}
.state{font-weight:600;white-space:nowrap}
.state.interrupted{color:var(--warn)}
nav{display:flex;flex-wrap:wrap;gap:.15rem 1rem;font-size:.875rem;margin-top:1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1.1rem 1.25rem;margin:1.5rem 0 1.25rem}
.tiles div{border-top:2px solid var(--ink);padding-top:.4rem}
.tiles b{display:block;font-size:1.5rem;line-height:1.2;font-weight:600;letter-spacing:-.01em}
.tiles span,.tiles small{display:block;font-size:.8125rem;line-height:1.35}
.why{border-left:3px solid var(--held);padding:.1rem 0 .1rem .85rem;margin:1rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:2rem 2.25rem}
.charts.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));margin-top:2rem}.small .plot{height:9.5rem}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem 1rem;align-items:baseline;margin-bottom:.5rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem}
.key{display:inline-block;width:1.1em;height:0;border-top:2px solid currentColor;vertical-align:.25em;margin-right:.4em}
.plot{position:relative;height:13.5rem;margin:0 .75rem 1.5rem 2.9rem}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden}
.plot span{position:absolute;font-size:.75rem;line-height:1;color:var(--quiet);white-space:nowrap}
.plot .x{top:100%;padding-top:.4rem;transform:translateX(-50%)}
.plot .y{right:100%;padding-right:.5rem;transform:translateY(50%)}

.axis{margin-left:auto}
.note{margin:.1rem 0 0 2.9rem;display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem;max-width:none}
svg path{fill:none;stroke:currentColor;stroke-width:1.75;vector-effect:non-scaling-stroke;stroke-linejoin:round}
svg .grid{stroke:var(--rule);stroke-width:1}
.train{color:var(--train)}.held{color:var(--held)}.limit,.mark{color:var(--quiet)}.warning{color:var(--warn)}
svg .band{fill:currentColor;stroke:none;opacity:.2}
svg .dots{stroke-width:6;stroke-linecap:round}
svg .chosen{stroke-width:10}
svg .whiskers{stroke-width:1.5}
svg .limit,svg .mark{stroke-width:1;stroke-dasharray:4 3}
svg .warning{stroke:var(--warn);stroke-width:2;stroke-dasharray:none}
.key.limit,.key.resumed{border-top:1px dashed var(--quiet)}.key.warning{border-color:var(--warn)}.key.dot{border-width:3px;width:.55em}
.scroll{overflow-x:auto;margin:.75rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;line-height:1.35;min-width:100%}
th,td{padding:.4rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{white-space:normal;font-weight:600;font-size:.8125rem;vertical-align:bottom;color:var(--quiet);line-height:1.25}
tbody th{text-align:left;font-weight:600;position:sticky;left:0;background:var(--paper)}
thead th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
th:first-child{padding-left:0}
td small{display:block}
.champion th,.champion td{background:var(--soft)}
.wide td,.wide th{text-align:left}
.wide td:last-child{white-space:normal;min-width:14rem}
.bar{display:block;width:9rem;height:.7rem;background:var(--rule);margin:.25rem 0}
.bar i{display:block;height:100%;background:var(--train)}
.facts{margin:.5rem 0}
.facts div{display:grid;grid-template-columns:11rem 1fr;gap:0 1.25rem;padding:.35rem 0;border-bottom:1px solid var(--rule);
font-size:.9375rem}
.facts dt{color:var(--quiet)}
.facts dd{margin:0;overflow-wrap:anywhere;min-width:0}
.facts dd small{display:block}
code,pre{font:.8125rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
pre{background:var(--soft);padding:.75rem .9rem;margin:.6rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
details{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;padding:.5rem 0;font-size:.9375rem;overflow-wrap:anywhere}
summary:hover{color:var(--train)}
.side{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr));gap:1rem 1.5rem;padding:.25rem 0 1.1rem}
.side div{min-width:0;break-inside:avoid}
.side b{display:block;font-size:.8125rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem;margin-bottom:.35rem}
.side .champion b{border-bottom:2px solid var(--held)}
.side p{margin:0;font-size:.875rem;line-height:1.45;white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:3rem;padding-top:.75rem;border-top:1px solid var(--rule)}
@media(max-width:34rem){body{padding:1.25rem 1rem 3rem}h1{font-size:1.6rem}.facts div{grid-template-columns:1fr}
.tiles{grid-template-columns:1fr 1fr}.tiles b{font-size:1.3rem}.plot{height:12rem;margin-left:2.6rem}.note{margin-left:0}
th,td{padding:.4rem .5rem}.bar{width:4rem}}
@media print{
html{font-size:9pt}
:root{--paper:#fff;--ink:#000;--quiet:#555;--rule:#ccc;--soft:#f3f3f3;--train:#2f5f9e;--held:#c05a1c;--warn:#b3261e;color-scheme:light}
@page{margin:15mm 14mm}
body{max-width:none;padding:0;-webkit-print-color-adjust:exact;print-color-adjust:exact}
nav,.screen{display:none}
h2{margin-top:1.5rem}
h2,h3,summary{break-after:avoid}
tr,.facts div,details:has(.side){break-inside:avoid}
.scroll{overflow:visible}
th,td{padding:.3rem .45rem}
.tiles{grid-template-columns:repeat(5,1fr)}
.charts{grid-template-columns:1fr 1fr;gap:1.25rem}
.charts.small{grid-template-columns:1fr 1fr 1fr}
.side{grid-template-columns:1fr 1fr 1fr}
details::details-content{content-visibility:visible;block-size:auto}
summary{list-style:none;font-weight:600}
}
"""
