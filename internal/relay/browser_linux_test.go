package relay

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/fetch"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/gorilla/websocket"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// app is a page, with a WebSocket that says what it hears.
func app(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/socket" {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<!doctype html><title>app</title><h1>The laptop's own version</h1>")
		return
	}
	conn, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer conn.Close()
	for {
		kind, b, err := conn.ReadMessage()
		if err != nil || conn.WriteMessage(kind, b) != nil {
			return
		}
	}
}

const appSays = "The laptop's own version"

// TestBrowser uses the pages with a real browser.
func TestBrowser(t *testing.T) {
	if !nettest.Inside(t) { // interfaces that come and go have a browser begin anew (ERR_NETWORK_CHANGED)
		return
	}
	w := newWorld(t)
	chrome := w.chrome()
	ann := w.first("ann@example.com").login()
	c := ann.cluster("prod", app)
	w.member("bob@example.com", w.team(), store.Member)
	w.member("gus@example.com", "", "")
	owner, colleague, visitor, anybody, other := chrome.tab(t), chrome.tab(t), chrome.tab(t), chrome.tab(t), chrome.tab(t) // a tab takes its time to open

	t.Run("Login", func(t *testing.T) {
		a := other.in(t)
		a.open("/people")
		a.sees("Log in", true)
		a.fill("E-mail address", "ann@example.com")
		a.fill("Password", "a guess")
		a.follow("Log in")
		a.sees("do not belong together", true)
		a.fill("Password", password)
		a.key(kb.Enter)
		a.sees("Invitations to crew", true) // where it wanted to go
		held := a.hold("/logout*")
		js[any](a, `addEventListener("submit", async () => { // the page left behind sees the logout before the logout's answer arrives
			while (!(await fetch("/people")).redirected);
			while (asking) await new Promise(soon => setTimeout(soon, 10));
			await refresh();
			fetch("/logout?seen");
		})`)
		a.press("Log out")
		answer := <-held
		<-held
		command(a, fetch.ContinueResponse, fetch.ContinueResponseParams{RequestID: answer})
		command(a, fetch.Disable, cdp.Empty{})
		a.sees("Password", true)
		if got := a.at(); got != "https://"+domain+"/login" {
			t.Errorf("logged out at %s", got)
		}
		a.open("/")
		a.sees("Password", true)
	})

	t.Run("WhoMaySee", func(t *testing.T) {
		p := ann.preview(c, "private")
		owner, stranger, member, guest := owner.in(t), anybody.in(t), colleague.in(t), visitor.in(t)
		stranger.open(p.URL)
		stranger.sees("Log in", true)
		for b, who := range map[*tab]string{member: "bob@example.com", guest: "gus@example.com"} {
			b.open(p.URL + "deep?x=1")
			b.login(who)
		}
		member.sees(appSays, true)
		if got := member.at(); got != p.URL+"deep?x=1" {
			t.Errorf("the member is at %s", got)
		}
		guest.sees("Not found", true)
		owner.open(p.URL)
		owner.login("ann@example.com")
		owner.sees(appSays, true)
	})

	t.Run("Publish", func(t *testing.T) {
		p := ann.preview(c, "published")
		o := owner.in(t)
		o.open("/")
		o.follow("published, " + p.Host)
		o.fill("Password, if you want one", "open sesame")
		o.follow("Publish")
		o.sees("everybody with the link and the password until", true)
		stranger := anybody.in(t)
		stranger.open(p.URL)
		stranger.sees("A password is needed", true)
		stranger.fill("Password", "open sesame")
		stranger.follow("Go on")
		stranger.sees(appSays, true)

		// A right that is taken away ends what is open, too.
		js[any](stranger, `window.socket = new Promise((heard, failed) => {
			const s = new WebSocket("wss://" + location.host + "/socket");
			s.onopen = () => s.send("hello");
			s.onmessage = m => heard(m.data);
			s.onerror = failed;
			s.onclose = () => window.closed_at = Date.now();
		})`)
		if got := ask(stranger, chromedp.Evaluate[string]("socket", chromedp.EvalAwaitPromise)); got != "hello" {
			t.Fatal(got)
		}
		// Who gives it another time does not have to think of the password.
		o.open("/previews/" + p.Host)
		o.press("Change time or password")
		o.shot("publish-again")
		o.follow("Publish")
		o.sees("everybody with the link and the password until", true)
		changed, taken := w.relay.store.Changed(), make(chan time.Time, 1)
		go func() {
			<-changed
			taken <- time.Now()
		}()
		o.follow("Unpublish")
		var closed float64
		w.until("the end of the WebSocket", func() bool {
			closed = js[float64](stranger, "window.closed_at || 0")
			return closed != 0
		})
		d := time.UnixMilli(int64(closed)).Sub(<-taken)
		t.Logf("the page saw it close after %v", d)
		if d > time.Second {
			t.Error("that is too late")
		}
		o.sees("Seen by\nthe team", true)
		stranger.open(p.URL)
		stranger.sees("Log in", true)
		o.open("/previews/" + p.Host)
		for _, part := range []string{"somebody with the link", "GET /socket", "cut"} {
			o.sees(part, true)
		}
	})

	t.Run("Laptop", func(t *testing.T) {
		code := make(chan string, 1)
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/" {
				code <- r.FormValue("code")
			}
			fmt.Fprint(w, "You can close this page")
		}))
		defer srv.Close()
		o := owner.in(t)
		o.open("/authorize?port=" + srv.URL[strings.LastIndex(srv.URL, ":")+1:] + "&challenge=" + secret.Challenge("x") + "&state=s&host=lap")
		o.follow("Log this laptop in")
		o.sees("You can close", true)
		if got := <-code; !strings.HasPrefix(got, "doppel_code_") {
			t.Error(got)
		}
	})

	t.Run("Live", func(t *testing.T) {
		p := ann.preview(c, "live")
		b := other.in(t)
		b.open("/previews/" + p.Host)
		b.login("ann@example.com")
		b.sees("Nobody yet.", true)
		b.press("Delete this preview")
		b.fill("Password, if you want one", "half a pass")
		js[any](b, "window.same = true")
		stranger := anybody.in(t)
		ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
		b.sees("Seen by\neverybody with the link", true)
		stranger.open(p.URL + "seen")
		b.sees("GET /seen", true)
		ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host}, nil)
		b.sees("Seen by\nthe team", true)
		if got := js[string](b, `[window.same, document.querySelector("[name=password]").value, document.activeElement.name, document.querySelector("details:last-of-type").open].join()`); got != "true,half a pass,password,true" {
			t.Errorf("what was filled in, focused and unfolded: %s", got)
		}
		b.find("Delete " + p.Host)
		if err := w.relay.store.Revoke(t.Context(), b.cookie()); err != nil { // logged out elsewhere
			t.Fatal(err)
		}
		b.sees("Log in", true)
	})

	t.Run("Share", func(t *testing.T) {
		p := ann.preview(c, "shared")
		o, guest := owner.in(t), visitor.in(t)
		o.open("/previews/" + p.Host)
		o.fill("E-mail address Of somebody who has an account here.", "gus@example.com")
		o.follow("Share")
		o.sees("the team, gus@example.com", true)
		guest.open(p.URL)
		guest.sees(appSays, true)
		o.follow("No longer share with gus@example.com")
		o.sees("Nobody beside the team.", true)
		guest.open(p.URL)
		guest.sees("Not found", true)
	})

	t.Run("AddCluster", func(t *testing.T) {
		o := owner.in(t)
		o.open("/")
		o.press("Add a cluster")
		o.fill("Name", "pilot")
		o.follow("Make it known")
		o.sees("doppel_link_", true)
		o.shot("cluster-added")
		o.follow("Back")
		o.sees("not connected", true)
	})

	t.Run("Intercept", func(t *testing.T) {
		b := owner.in(t)
		m := ann.in(b.w).present("thinkpad", relayapi.Connection{Name: "prod", Cluster: c.id, Namespace: "shop"})
		b.open("/")
		b.follow("Start an intercept on thinkpad")
		b.sees("You have not allowed this relay yet", true)
		b.fill("Workload A name, or KIND/NAME.", "deployment/web")
		b.fill("Port on this laptop Where your own version listens.", "3000")
		b.fill("Name", "x-user")
		b.fill("Value", "ann")
		b.follow("Start")
		b.sees("waiting for permission", true)
		b.shot("laptop-waiting")
		m.say(relayapi.Allowed) // doppel relay allow
		got := <-m.asked
		if got.Workload != "deployment/web" || got.Local != 3000 || got.Header != "x-user" || got.Value != "ann" || got.Namespace != "shop" {
			t.Errorf("%+v", got)
		}
		b.sees("Waiting for the agent", true)
		m.done <- nil
		b.sees("Or with doppel leave web on the laptop", true)
		b.sees("2 workloads of the namespace to choose from", true)
		b.fill("Port on this laptop Where your own version listens.", "3001")
		b.fill("Workload 2 workloads of the namespace to choose from.", "Deployment/wbe")
		b.follow("Start")
		<-m.asked
		m.done <- uerr.New(uerr.NotFound, "see what there is with: doppel list -n shop", "there is no Deployment wbe in namespace shop")
		b.sees("there is no Deployment wbe", true)
		b.judge("laptop", "/laptops/"+w.laptop("thinkpad"))
	})

	t.Run("NoScript", func(t *testing.T) {
		p := ann.preview(c, "plain")
		b := other.in(t)
		command(b, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
		b.open("/")
		b.login("ann@example.com")
		b.follow("plain, " + p.Host)
		b.follow("Publish")
		if html := ask(b, chromedp.OuterHTML(chromedp.CSS("main"))); !strings.Contains(html, "everybody with the link until") {
			t.Error(html)
		}
	})

	t.Run("EveryPage", func(t *testing.T) {
		mine, public := ann.preview(c, "checkout"), ann.preview(c, "web")
		w.join(&cluster{id: c.id, token: c.token, app: c.app, shows: []relayapi.LivePreview{{ID: public.ID, Laptop: true}, {ID: mine.ID}}})
		ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: public.Host, Public: true, Password: "x", For: time.Hour}, nil)
		ann.must(relayapi.PathSharePreview, relayapi.ShareRequest{Preview: public.Host, Email: "gus@example.com"}, nil)
		away, err := w.relay.store.AddCluster(t.Context(), w.team(), "staging")
		if err != nil {
			t.Fatal(err)
		}
		invite, err := w.relay.store.AddToken(t.Context(), store.Token{Kind: store.Invite, Person: w.person("ann@example.com").ID, Subject: w.team(), Data: "member"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		o := owner.in(t)
		o.open(public.URL + "orders/17?secret")
		for _, page := range []struct {
			name, path string
			tab        *tab
		}{
			{"login", "/login", anybody},
			{"invitation", "/invite?token=" + invite, anybody},
			{"join-team", "/invite?token=" + invite, visitor},
			{"password", public.URL, anybody},
			{"first-steps", "/", visitor},
			{"previews", "/", o},
			{"preview", "/previews/" + mine.Host, o},
			{"preview-published", "/previews/" + public.Host, o},
			{"preview-of-another", "/previews/" + public.Host, colleague},
			{"people", "/people", o},
			{"account", "/account", o},
			{"cluster", "/clusters/" + c.id, o},
			{"cluster-away", "/clusters/" + away.ID, o},
			{"authorize", "/authorize?port=7777&challenge=" + strings.Repeat("x", 43) + "&state=s&host=ann-thinkpad", o},
			{"not-found", "/none", o},
		} {
			t.Run(page.name, func(t *testing.T) { page.tab.in(t).judge(page.name, page.path) })
		}
	})
}

// judge looks at a page as everybody has to be able to use it: with any colours, on a phone, with the keyboard, by its names.
func (t *tab) judge(name, path string) {
	t.w.t.Helper()
	t.open(path)
	for _, dark := range []bool{false, true} {
		t.dark(dark)
		if pale := js[[]string](t, pale); len(pale) > 0 {
			t.w.t.Errorf("dark %v: too little contrast: %q", dark, pale)
		}
		t.shot(name + map[bool]string{false: "-light", true: "-dark"}[dark])
	}
	for _, c := range ask(t, controls) {
		if c.name == "" {
			t.w.t.Errorf("a %s has no name", c.role)
		}
	}
	if h := js[[]string](t, "[...document.querySelectorAll('h1')].map(h => h.innerText)"); len(h) != 1 || js[string](t, "document.documentElement.lang") == "" || js[string](t, "document.title") == "" {
		t.w.t.Errorf("headings %q, or no title or language", h)
	}
	stops := js[int](t, stops+".length")
	from := max(0, js[int](t, stop+".Index")) // a field may have the focus from the beginning
	for i := from; i < stops; i++ {
		if i > from || js[int](t, stop+".Index") < 0 {
			t.key(kb.Tab)
		}
		if s := js[focused](t, stop); s.Index != i || !s.Ring || !s.Seen {
			t.w.t.Errorf("stop %d of %d with the keyboard: %+v", i, stops, s)
			break
		}
	}
	t.do(chromedp.EmulateViewport(phone, 700))
	if w := js[int](t, "document.documentElement.scrollWidth"); w > phone {
		t.w.t.Errorf("on a phone it is %d wide", w)
	}
	t.shot(name + "-phone")
	t.do(chromedp.EmulateViewport(wide, 800))
}

// focused is what has the keyboard's focus.
type focused struct {
	Index      int
	Ring, Seen bool
	HTML       string
}

// Scripts: what the keyboard is to reach, in its order; what has the focus now; and texts whose contrast is below 4.5 (WCAG 2.2, 1.4.3).
const (
	stops = `[...document.querySelectorAll("a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex='0']")].filter(e => e.checkVisibility())`
	stop  = `(() => {
		const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect();
		return {Index: ` + stops + `.indexOf(e), Ring: s.outlineStyle != "none" && parseFloat(s.outlineWidth) >= 2,
			Seen: r.width > 0 && r.left >= 0 && r.right <= innerWidth + 1 && r.bottom > 0 && r.top < innerHeight, HTML: e.outerHTML.slice(0, 200)};
	})()`
	pale = `(() => {
		const light = c => { const [r, g, b] = c.match(/[\d.]+/g).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
		const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\)$/.test(c)) return c; } return "rgb(255, 255, 255)"; };
		const out = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
		while (walk.nextNode()) {
			const e = walk.currentNode.parentElement;
			if (!walk.currentNode.data.trim() || !e.checkVisibility()) continue;
			const a = light(getComputedStyle(e).color), b = light(behind(e)), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
			if (ratio < 4.5) out.push(ratio.toFixed(2) + " " + walk.currentNode.data.trim());
		}
		return out;
	})()`
)
