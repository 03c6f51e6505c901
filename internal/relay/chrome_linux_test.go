package relay

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/dom"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/fetch"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/doppel-dev/doppel/internal/relay/secret"
)

// screenshots is a directory that gets pictures of the pages, for people to look at; empty: none are kept.
var screenshots = os.Getenv("DOPPEL_SCREENSHOTS")

// chrome is a Chromium for which the names of the relay's domain lead to a world's relay.
type chrome struct {
	w   *world
	ctx context.Context
}

// tab is a page in a profile of its own: one person's browser. It is used as a person does whom a screen reader tells what there is: controls are
// found by their accessible names.
type tab struct {
	w   *world
	ctx context.Context
	bad *badNews
}

// badNews is what a page breaks of its own rules (Content-Security-Policy), and what its script throws.
type badNews struct {
	mu  sync.Mutex
	all []string // guarded by mu
}

func (b *badNews) listen(ev any) {
	what := ""
	switch ev := ev.(type) {
	case *log.EventEntryAdded:
		if ev.Entry.Source == log.EntrySourceSecurity || ev.Entry.Source == log.EntrySourceJavascript {
			what = ev.Entry.Text
		}
	case *runtime.EventExceptionThrown:
		what = ev.ExceptionDetails.Text
		if ev.ExceptionDetails.Exception != nil {
			what += " " + ev.ExceptionDetails.Exception.Description
		}
	}
	if what != "" {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.all = append(b.all, what)
	}
}

func (w *world) chrome() *chrome {
	w.t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		w.t.Skip("there is no chromium on this machine")
	}
	conn, err := tls.Dial("tcp", w.addr, &tls.Config{RootCAs: w.roots, ServerName: domain})
	if err != nil {
		w.t.Fatal(err)
	}
	key := sha256.Sum256(conn.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo)
	conn.Close()
	ctx, cancel := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.DisableGPU, chromedp.UserDataDir(w.t.TempDir()),
		chromedp.Flag("host-resolver-rules", "MAP *."+domain+" "+w.addr+", MAP "+domain+" "+w.addr+", MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
		chromedp.Flag("ignore-certificate-errors-spki-list", base64.StdEncoding.EncodeToString(key[:])))...)
	w.t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	w.t.Cleanup(cancel)
	if err := chromedp.Do(ctx); err != nil { // starts it
		w.t.Fatal(err)
	}
	return &chrome{w, ctx}
}

// tab opens a new person's browser, for a test.
func (c *chrome) tab(tb *testing.T) *tab {
	tb.Helper()
	w := *c.w
	w.t = tb
	t := &tab{w: &w, bad: &badNews{}}
	var cancel context.CancelFunc
	t.ctx, cancel = chromedp.NewContext(c.ctx, chromedp.WithNewBrowserContext(), chromedp.WithListener(t.bad.listen))
	tb.Cleanup(func() {
		cancel()
		t.bad.mu.Lock()
		defer t.bad.mu.Unlock()
		for _, what := range t.bad.all {
			tb.Errorf("the browser says: %s", what)
		}
	})
	if err := chromedp.Do(t.ctx, chromedp.EmulateViewport(wide, 800)); err != nil { // without a deadline: the page lives as long as this first context
		tb.Fatal(err)
	}
	return t
}

// in is the same tab in a part of a test.
func (t *tab) in(tb *testing.T) *tab {
	w := *t.w
	w.t = tb
	return &tab{&w, t.ctx, t.bad}
}

// Widths of windows.
const (
	wide  = 1200
	phone = 360
)

// do runs steps, within a time.
func (t *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	t.w.t.Helper()
	ctx, cancel := context.WithTimeout(t.ctx, 20*time.Second)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		t.w.t.Fatal(err)
	}
}

// ask is do for a step with a result.
func ask[T any](t *tab, a chromedp.Action[T]) T {
	t.w.t.Helper()
	ctx, cancel := context.WithTimeout(t.ctx, 20*time.Second)
	defer cancel()
	v, err := chromedp.Run(ctx, a)
	if err != nil {
		t.w.t.Fatal(err)
	}
	return v
}

// command is ask for a command of the protocol.
func command[P, R any](t *tab, c cdp.Command[P, R], p P) R {
	t.w.t.Helper()
	return ask(t, func(ctx context.Context, _ *chromedp.Target) (R, error) { return chromedp.Call(ctx, c, p) })
}

func js[T any](t *tab, expression string) T {
	t.w.t.Helper()
	return ask(t, chromedp.Evaluate[T](expression))
}

func (t *tab) open(u string) {
	t.w.t.Helper()
	if strings.HasPrefix(u, "/") {
		u = "https://" + domain + u
	}
	ctx, cancel := context.WithTimeout(t.ctx, 20*time.Second)
	defer cancel()
	t.w.until("the way to "+u, func() bool {
		err := chromedp.Do(ctx, chromedp.Navigate(u))
		if err != nil && !strings.Contains(err.Error(), "net::ERR_ABORTED") { // a page that reloads itself just then has its way
			t.w.t.Fatal(err)
		}
		return err == nil
	})
}

func (t *tab) at() string { return ask(t, chromedp.Location()) }

// soon asks again and again until the answer will do. A page that makes way for another one gives none.
func soon[T any](t *tab, what string, a chromedp.Action[T], ok func(T) bool) (v T) {
	t.w.t.Helper()
	ctx, cancel := context.WithTimeout(t.ctx, 10*time.Second)
	defer cancel()
	t.w.until(what, func() bool {
		var err error
		v, err = chromedp.Run(ctx, a)
		return err == nil && ok(v)
	})
	return v
}

// sees waits until something is to be read on the page, or not.
func (t *tab) sees(part string, want bool) {
	t.w.t.Helper()
	last := ""
	defer func() {
		if t.w.t.Failed() {
			t.w.t.Logf("it says:\n%s", last)
		}
	}()
	soon(t, part, chromedp.Evaluate[string]("document.body.innerText"), func(text string) bool {
		last = text
		return strings.Contains(text, part) == want
	})
}

// control is what a person acts on.
type control struct {
	role, name string
	node       cdp.BackendNodeID
}

// controls are the controls of the page as a screen reader tells them.
func controls(ctx context.Context, _ *chromedp.Target) ([]control, error) {
	tree, err := chromedp.Call(ctx, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
	var out []control
	for _, n := range tree.Nodes {
		if n.Ignored || n.Role == nil {
			continue
		}
		role := value(n.Role)
		switch role {
		case "button", "link", "textbox", "combobox", "checkbox", "radio", "DisclosureTriangle", "spinbutton", "searchbox", "listbox":
			out = append(out, control{role, value(n.Name), n.BackendDOMNodeID})
		}
	}
	return out, err
}

func value(v *accessibility.Value) string {
	if v == nil {
		return ""
	}
	return strings.Trim(string(v.Value), `"`)
}

// find waits for the one control of that name.
func (t *tab) find(name string) (found control) {
	t.w.t.Helper()
	var last []control
	defer func() {
		if t.w.t.Failed() {
			t.w.t.Logf("there are %v", last)
		}
	}()
	soon(t, name, controls, func(all []control) bool {
		last = all
		named := slices.DeleteFunc(slices.Clone(all), func(c control) bool { return c.name != name })
		if len(named) == 1 {
			found = named[0]
		}
		return len(named) == 1
	})
	return found
}

// press clicks on a control.
func (t *tab) press(name string) {
	t.w.t.Helper()
	t.do(t.click(t.find(name)))
}

// follow is press for what leads to a page.
func (t *tab) follow(name string) {
	t.w.t.Helper()
	c := t.find(name)
	ctx, cancel := context.WithTimeout(t.ctx, 20*time.Second)
	defer cancel()
	if _, err := chromedp.RunResponse(ctx, t.click(c)); err != nil {
		t.w.t.Fatalf("%s: %v", name, err)
	}
}

func (t *tab) click(c control) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, _ *chromedp.Target) error {
		if _, err := chromedp.Call(ctx, dom.ScrollIntoViewIfNeeded, dom.ScrollIntoViewIfNeededParams{BackendNodeID: c.node}); err != nil {
			return err
		}
		r, err := chromedp.Call(ctx, dom.GetContentQuads, dom.GetContentQuadsParams{BackendNodeID: c.node})
		if err != nil {
			return err
		}
		q := r.Quads[0]
		return chromedp.Do(ctx, chromedp.MouseClickXY((q[0]+q[4])/2, (q[1]+q[5])/2))
	})
}

// hold keeps the answers to requests for a path back, each until it is told to go on.
func (t *tab) hold(path string) <-chan fetch.RequestID {
	t.w.t.Helper()
	held := make(chan fetch.RequestID, 1)
	err := chromedp.Listen(t.ctx, func(ev any) {
		if paused, ok := ev.(*fetch.EventRequestPaused); ok {
			held <- paused.RequestID
		}
	})
	if err != nil {
		t.w.t.Fatal(err)
	}
	command(t, fetch.Enable, fetch.EnableParams{Patterns: []*fetch.RequestPattern{{URLPattern: "*" + path, RequestStage: fetch.RequestStageResponse}}})
	return held
}

// fill writes into a field in the place of what is there.
func (t *tab) fill(name, text string) {
	t.w.t.Helper()
	c := t.find(name)
	command(t, dom.Focus, dom.FocusParams{BackendNodeID: c.node})
	js[any](t, "document.activeElement.select()")
	command(t, input.InsertText, input.InsertTextParams{Text: text})
}

// cookie is the hash of the tab's login.
func (t *tab) cookie() string {
	t.w.t.Helper()
	for _, c := range command(t, network.GetCookies, network.GetCookiesParams{URLs: []string{"https://" + domain}}).Cookies {
		if c.Name == "__Host-doppel" {
			return secret.Hash(c.Value)
		}
	}
	t.w.t.Fatal("not logged in")
	return ""
}

// key presses a key.
func (t *tab) key(k string) { t.do(chromedp.KeyEvent(k)) }

// dark says which colours the person likes.
func (t *tab) dark(on bool) {
	command(t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
		{Name: "prefers-color-scheme", Value: map[bool]string{false: "light", true: "dark"}[on]},
	}})
}

// shot keeps a picture of the whole page.
func (t *tab) shot(name string) {
	t.w.t.Helper()
	if screenshots == "" {
		return
	}
	b := ask(t, chromedp.FullScreenshot(100))
	if err := os.WriteFile(filepath.Join(screenshots, name+".png"), b, 0o644); err != nil {
		t.w.t.Fatal(err)
	}
}

// login logs a person in, where the login page is.
func (t *tab) login(email string) {
	t.w.t.Helper()
	t.fill("E-mail address", email)
	t.fill("Password", password)
	t.follow("Log in")
}
