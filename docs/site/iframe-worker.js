/* Search runs in a worker, and browsers start none for pages opened from a disk (file://). There a hidden frame does its work.
   The theme would load such a script from a server; this one is part of the site. */
class IFrameWorker extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.appendChild(frame)
    this.inside = frame.contentWindow
    this.frame = frame
    this.receive = event => {
      if (event.source !== this.inside) return
      this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      if (this.onmessage) this.onmessage(event)
    }
    addEventListener("message", this.receive)
    const page = this.inside.document
    page.open()
    page.write(`<html><body><script>
      postMessage = data => parent.dispatchEvent(new MessageEvent("message", { source: window, data }))
      importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, fail) => {
        const script = document.createElement("script")
        Object.assign(script, { src: url, onload: done, onerror: fail })
        document.body.appendChild(script)
      })), Promise.resolve())
    <` + `/script><script src="${url}"><` + `/script></body></html>`)
    page.close()
    this.ready = new Promise(done => { this.inside.onload = done })
  }

  postMessage(data) {
    this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
  }

  terminate() {
    removeEventListener("message", this.receive)
    this.frame.remove()
  }
}

if (location.protocol === "file:") window.Worker = IFrameWorker
