package relay

import (
	"html"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// person finds somebody's account.
func (w *world) person(email string) store.Person {
	w.t.Helper()
	p, err := w.relay.store.PersonByEmail(w.t.Context(), email)
	if err != nil {
		w.t.Fatal(email, err)
	}
	return p
}

// others makes another team, with an admin of its own.
func (w *world) others() (*browser, store.Team) {
	w.t.Helper()
	t, err := w.relay.store.AddTeam(w.t.Context(), "others")
	if err != nil {
		w.t.Fatal(err)
	}
	return w.member("oli@example.com", t.ID, store.Admin), t
}

var inviteLink = regexp.MustCompile(`https://` + domain + `/invite\?token=[\w-]+`)

func TestInvitation(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	as := func(role string) url.Values { return url.Values{"team": {w.team()}, "role": {role}} }
	a := ann.submit("/people/invite", as("member"))
	link := inviteLink.FindString(a.body)
	u, err := url.Parse(link)
	if a.status != http.StatusOK || link == "" || err != nil {
		t.Fatalf("%v", a)
	}
	if a := ann.visit("https://" + domain + "/people"); !strings.Contains(a.body, "as member, until") || strings.Contains(a.body, u.Query().Get("token")) {
		t.Errorf("%v", a)
	}
	bob := w.browser()
	join := url.Values{"token": u.Query()["token"], "email": {"bob@example.com"}, "password": {password}}
	if a := bob.visit(link); a.status != http.StatusOK || !strings.Contains(a.body, "Make the account") {
		t.Errorf("%v", a)
	}
	if a := bob.submit("/invite", join); a.status != http.StatusOK || !strings.Contains(a.body, "bob@example.com") {
		t.Errorf("%v", a)
	}
	if role, err := w.relay.store.RoleOf(t.Context(), w.team(), w.person("bob@example.com").ID); role != store.Member || err != nil {
		t.Errorf("%q %v", role, err)
	}
	if a := w.browser().visit(link); a.status != http.StatusNotFound {
		t.Errorf("used twice: %v", a)
	}
	if a := bob.visit("https://" + domain + "/people"); !strings.Contains(a.body, "ann@example.com") || strings.Contains(a.body, `action="/people`) {
		t.Errorf("a member's page: %v", a)
	}
	if a := ann.submit("/people/invite", as("owner")); a.status != http.StatusBadRequest {
		t.Errorf("no such role: %v", a)
	}

	// Taken back, by hand or with its giver's role, a link is worth nothing.
	open := func() string {
		all, err := w.relay.store.Tokens(t.Context(), store.Invite, w.team(), "")
		if err != nil || len(all) != 1 {
			t.Fatal(all, err)
		}
		return all[0].Hash
	}
	link = inviteLink.FindString(ann.submit("/people/invite", as("admin")).body)
	if a := bob.submit("/people/uninvite", url.Values{"invitation": {open()}}); a.status != http.StatusForbidden {
		t.Errorf("by a member: %v", a)
	}
	oli, _ := w.others()
	if a := oli.submit("/people/uninvite", url.Values{"invitation": {open()}}); a.status != http.StatusNotFound {
		t.Errorf("by another team's admin: %v", a)
	}
	if a := ann.submit("/people/uninvite", url.Values{"invitation": {open()}}); a.status != http.StatusOK {
		t.Errorf("%v", a)
	}
	if a := w.browser().visit(link); a.status != http.StatusNotFound {
		t.Errorf("taken back: %v", a)
	}
	bobsPlace := func(role string) url.Values {
		return url.Values{"team": {w.team()}, "person": {w.person("bob@example.com").ID}, "role": {role}}
	}
	ann.submit("/people/role", bobsPlace("admin"))
	link = inviteLink.FindString(bob.submit("/people/invite", as("admin")).body)
	if a := w.browser().visit(link); a.status != http.StatusOK {
		t.Errorf("%v", a)
	}
	ann.submit("/people/role", bobsPlace("member"))
	if a := w.browser().visit(link); a.status != http.StatusNotFound {
		t.Errorf("of somebody who is no admin any more: %v", a)
	}
}

// Whoever has an account already, and was taken out of the team say, joins with that account.
func TestJoinAgain(t *testing.T) { onBoth(t, testJoinAgain) }

func testJoinAgain(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	ann := w.first("ann@example.com")
	bob := w.member("bob@example.com", w.team(), store.Member)
	place := func(email string) store.Role {
		role, err := w.relay.store.RoleOf(t.Context(), w.team(), w.person(email).ID)
		if err != nil {
			t.Fatal(err)
		}
		return role
	}
	invite := func(role string) (link string, form url.Values) {
		link = inviteLink.FindString(ann.submit("/people/invite", url.Values{"team": {w.team()}, "role": {role}}).body)
		u, err := url.Parse(link)
		if err != nil || link == "" {
			t.Fatal(link, err)
		}
		return link, u.Query()
	}
	link, form := invite("member")
	for who, b := range map[string]*browser{"a member": bob, "an admin": ann} {
		if a := b.visit(link); a.status != http.StatusOK || !strings.Contains(a.body, "of crew already") || strings.Contains(a.body, "Join crew") {
			t.Errorf("%s: %v", who, a)
		}
		b.submit("/join", form)
	}
	if place("ann@example.com") != store.Admin {
		t.Error("an admin has become a member")
	}
	if err := w.relay.store.SetMember(t.Context(), w.team(), w.person("bob@example.com").ID, ""); err != nil {
		t.Fatal(err)
	}

	// Not logged in, he is told to, and comes back.
	form.Set("email", "bob@example.com")
	form.Set("password", password)
	stranger := w.browser()
	a := stranger.submit("/invite", form)
	if a.status != http.StatusConflict || !strings.Contains(a.body, "log in first, and then open this link again") {
		t.Errorf("%v", a)
	}
	m := regexp.MustCompile(`href="(/login\?[^"]+)"`).FindStringSubmatch(a.body)
	if m == nil {
		t.Fatalf("no way to log in: %v", a)
	}
	in, err := url.Parse(html.UnescapeString(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	a = stranger.submit("/login", url.Values{"email": {"bob@example.com"}, "password": {password}, "next": {in.Query().Get("next")}})
	if a.status != http.StatusOK || a.url != link || !strings.Contains(a.body, "Join crew as member</button>") || !strings.Contains(a.body, "bob@example.com") {
		t.Errorf("%v", a)
	}
	if a := w.browser().still().submit("/join", form); a.status != http.StatusSeeOther || place("bob@example.com") != "" {
		t.Errorf("a stranger: %v", a)
	}
	if a := stranger.submit("/join", form); a.status != http.StatusOK || a.url != "https://"+domain+"/" || place("bob@example.com") != store.Member {
		t.Errorf("%v", a)
	}
	for name, a := range map[string]answer{"the page": ann.visit(link), "the form": ann.submit("/join", form), "a new account": w.browser().visit(link)} {
		if a.status != http.StatusNotFound {
			t.Errorf("used twice, %s: %v", name, a)
		}
	}

	// A member becomes an admin by an invitation, too; and one that was taken back is none.
	_, form = invite("admin")
	if a := bob.submit("/join", form); a.status != http.StatusOK || place("bob@example.com") != store.Admin {
		t.Errorf("%v", a)
	}
	_, form = invite("member")
	open, err := w.relay.store.Tokens(t.Context(), store.Invite, w.team(), "")
	if err != nil || len(open) != 1 {
		t.Fatal(open, err)
	}
	ann.submit("/people/uninvite", url.Values{"invitation": {open[0].Hash}})
	gus := w.member("gus@example.com", "", "")
	if a := gus.submit("/join", form); a.status != http.StatusNotFound || place("gus@example.com") != "" {
		t.Errorf("taken back: %v", a)
	}
}

func TestPeople(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	bob, cleo := w.member("bob@example.com", w.team(), store.Member), w.member("cleo@example.com", w.team(), store.Member)
	oli, others := w.others()
	form := func(team, email string, more ...string) url.Values {
		v := url.Values{"team": {team}, "person": {w.person(email).ID}}
		for i := 0; i < len(more); i += 2 {
			v.Set(more[i], more[i+1])
		}
		return v
	}
	for name, c := range map[string]struct {
		who    *browser
		path   string
		form   url.Values
		status int
	}{
		"a member invites":                    {bob, "/people/invite", url.Values{"team": {w.team()}, "role": {"admin"}}, 403},
		"a member makes himself admin":        {bob, "/people/role", form(w.team(), "bob@example.com", "role", "admin"), 403},
		"a member disables":                   {bob, "/people/disable", form(w.team(), "cleo@example.com", "disabled", "true"), 403},
		"another team's admin invites":        {oli, "/people/invite", url.Values{"team": {w.team()}, "role": {"admin"}}, 404},
		"another team's admin joins":          {oli, "/people/role", form(w.team(), "oli@example.com", "role", "admin"), 404},
		"another team's admin takes somebody": {oli, "/people/role", form(others.ID, "bob@example.com", "role", "member"), 404},
		"another team's admin disables":       {oli, "/people/disable", form(others.ID, "bob@example.com", "disabled", "true"), 404},
		"the last admin steps down":           {ann, "/people/role", form(w.team(), "ann@example.com", "role", "member"), 409},
		"the last admin leaves":               {ann, "/people/role", form(w.team(), "ann@example.com", "role", "out"), 409},
		"the last admin disables herself":     {ann, "/people/disable", form(w.team(), "ann@example.com", "disabled", "true"), 409},
		"no such role":                        {ann, "/people/role", form(w.team(), "bob@example.com", "role", ""), 400},
		"a stranger":                          {w.browser().still(), "/people/invite", url.Values{"team": {w.team()}, "role": {"admin"}}, 303},
	} {
		if a := c.who.submit(c.path, c.form); a.status != c.status {
			t.Errorf("%s: want %d: %v", name, c.status, a)
		}
	}
	if a := ann.submit("/people/disable", form(w.team(), "bob@example.com", "disabled", "true")); a.status != 200 || !strings.Contains(a.body, "member, disabled") {
		t.Errorf("%v", a)
	}
	if a := bob.visit("https://" + domain + "/people"); !strings.HasPrefix(a.url, "https://"+domain+"/login") {
		t.Errorf("disabled, and in: %v", a)
	}
	if a := ann.submit("/people/disable", form(w.team(), "bob@example.com", "disabled", "false")); a.status != 200 || strings.Contains(a.body, "member, disabled") {
		t.Errorf("%v", a)
	}
	if a := ann.submit("/people/role", form(w.team(), "cleo@example.com", "role", "out")); a.status != 200 || strings.Contains(a.body, "Role of cleo@example.com") {
		t.Errorf("%v", a)
	}
	if a := cleo.visit("https://" + domain + "/people"); !strings.Contains(a.body, "in no team") {
		t.Errorf("%v", a)
	}
	// Who is in no team is every admin's to disable, and nobody else's.
	dan := w.member("dan@example.com", w.team(), store.Member)
	if a := dan.submit("/people/disable", form("", "cleo@example.com", "disabled", "true")); a.status != 403 || strings.Contains(dan.visit("https://"+domain+"/people").body, "cleo@") {
		t.Errorf("a member: %v", a)
	}
	if a := ann.submit("/people/disable", form("", "bob@example.com", "disabled", "true")); a.status != 404 {
		t.Errorf("who is in a team: %v", a)
	}
	ann.shows("/people", "Disable cleo@example.com")
	if a := oli.submit("/people/disable", form("", "cleo@example.com", "disabled", "true")); a.status != 200 || !w.person("cleo@example.com").Disabled {
		t.Errorf("%v", a)
	}
	if a := cleo.visit("https://" + domain + "/people"); !strings.HasPrefix(a.url, "https://"+domain+"/login") {
		t.Errorf("disabled, and in: %v", a)
	}
	ann.shows("/people", "Enable cleo@example.com")
	if a := ann.submit("/people/disable", form("", "cleo@example.com", "disabled", "false")); a.status != 200 || w.person("cleo@example.com").Disabled {
		t.Errorf("%v", a)
	}
	// Who is in another team too is not this one's to disable.
	if err := w.relay.store.SetMember(t.Context(), others.ID, w.person("bob@example.com").ID, store.Member); err != nil {
		t.Fatal(err)
	}
	if a := ann.submit("/people/disable", form(w.team(), "bob@example.com", "disabled", "true")); a.status != 403 || w.person("bob@example.com").Disabled {
		t.Errorf("%v", a)
	}
}

func TestPreviewPage(t *testing.T) {
	w := newWorld(t)
	annB := w.first("ann@example.com")
	c := annB.login().cluster("prod", echo)
	bob, cleo := w.member("bob@example.com", w.team(), store.Member), w.member("cleo@example.com", w.team(), store.Member)
	oli, _ := w.others()
	p := bob.login().preview(c, "web")
	page := "https://" + domain + "/previews/" + p.Host
	bob.visit(p.URL + "a?secret=1")
	w.until("the visit", func() bool {
		a := bob.visit(page)
		return strings.Contains(a.body, "GET /a</code>") && strings.Contains(a.body, "<td>200</td>") && strings.Contains(a.body, "<td>bob@example.com <small")
	})
	if a := bob.visit(page); strings.Contains(a.body, "secret=1") || strings.Contains(a.body, p.ID) {
		t.Errorf("%v", a)
	}
	if a := cleo.visit(page); a.status != http.StatusOK || strings.Contains(a.body, "GET /a") || strings.Contains(a.body, "<form method=\"post\" action=\"/previews") {
		t.Errorf("of another member: %v", a)
	}
	if a := oli.visit(page); a.status != http.StatusNotFound {
		t.Errorf("of another team: %v", a)
	}
	if a := w.browser().visit(page); !strings.HasPrefix(a.url, "https://"+domain+"/login?") {
		t.Errorf("of a stranger: %v", a)
	}
	for _, action := range []string{"/publish", "/unpublish", "/share", "/delete"} {
		for name, c := range map[string]struct {
			who    *browser
			status int
		}{"another member": {cleo, 403}, "another team": {oli, 404}, "a stranger": {w.browser().still(), 303}} {
			if a := c.who.submit("/previews/"+p.Host+action, nil); a.status != c.status {
				t.Errorf("%s, %s: want %d: %v", action, name, c.status, a)
			}
		}
	}
	sees := func(want bool) {
		t.Helper()
		if a := w.browser().visit(p.URL); strings.Contains(a.body, "GET / host=") != want {
			t.Errorf("a stranger sees it: %v, want %v: %v", !want, want, a)
		}
	}
	sees(false)
	for _, d := range []string{"-1h", "0s", "soon"} {
		if a := bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {d}}); a.status != http.StatusBadRequest || !strings.Contains(a.body, "no time for which") {
			t.Errorf("%q: %v", d, a)
		}
	}
	sees(false)
	if a := bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {"1h"}}); a.status != http.StatusOK || !strings.Contains(a.body, "everybody with the link until") {
		t.Errorf("%v", a)
	}
	sees(true)
	if a := bob.submit("/previews/"+p.Host+"/publish", url.Values{"password": {"swordfish"}}); !strings.Contains(a.body, "everybody with the link and the password</dd>") {
		t.Errorf("%v", a)
	}
	sees(false)
	// The form for another time keeps the password, and the one for another password the time.
	if a := bob.visit(page); !strings.Contains(a.body, `name="keep" value="true" checked>`) || !strings.Contains(a.body, `<option value="" selected>`) || strings.Contains(a.body, `value="same"`) {
		t.Errorf("%v", a)
	}
	if a := bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {"1h"}, "keep": {"true"}}); !strings.Contains(a.body, "everybody with the link and the password until") || !strings.Contains(a.body, `value="same" selected`) {
		t.Errorf("%v", a)
	}
	sees(false)
	end := func() (time.Time, string) {
		p, err := w.relay.store.PreviewByHost(t.Context(), p.Host)
		if err != nil {
			t.Fatal(err)
		}
		return p.Expires, p.Password
	}
	until, hash := end()
	if a := bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {"same"}, "keep": {"true"}, "password": {"tunafish"}}); a.status != http.StatusOK {
		t.Errorf("%v", a)
	}
	if u, h := end(); !u.Equal(until) || h == hash || h == "" {
		t.Errorf("until %v and not %v, or the password stayed", u, until)
	}
	// A form of before there was one knows nothing of it, and does not take it away.
	if a := bob.visit(page); !strings.Contains(a.body, `name="locked" value="true"`) {
		t.Errorf("%v", a)
	}
	_, hash = end()
	bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {"8h"}})
	if u, h := end(); h != hash || !u.After(until) {
		t.Errorf("until %v, and the password is another: %v", u, h != hash)
	}
	sees(false)
	bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {"1h"}, "locked": {"true"}})
	sees(true)
	if a := bob.visit(page); strings.Contains(a.body, `name="keep"`) || strings.Contains(a.body, `name="locked"`) {
		t.Errorf("%v", a)
	}
	// One whose time is over has its password still, and no end to be kept.
	bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {"1ms"}, "password": {"swordfish"}})
	w.until("the end of the time", func() bool { return strings.Contains(bob.visit(page).body, "<dd>the team</dd>") })
	if a := bob.visit(page); !strings.Contains(a.body, `name="keep"`) || strings.Contains(a.body, `value="same"`) {
		t.Errorf("%v", a)
	}
	if a := bob.submit("/previews/"+p.Host+"/publish", url.Values{"for": {"same"}, "keep": {"true"}}); a.status != http.StatusBadRequest {
		t.Errorf("an end that was: %v", a)
	}
	if a := annB.submit("/previews/"+p.Host+"/unpublish", nil); a.status != http.StatusOK || !strings.Contains(a.body, "<dd>the team</dd>") { // an admin
		t.Errorf("%v", a)
	}
	sees(false)
	// Whoever is invited next could take an address that nobody has.
	if a := bob.submit("/previews/"+p.Host+"/share", url.Values{"email": {"gus@example.com"}}); a.status != http.StatusConflict || !strings.Contains(a.body, "invite them first") {
		t.Errorf("%v", a)
	}
	if status := bob.login().call(relayapi.PathSharePreview, relayapi.ShareRequest{Preview: p.Host, Email: "gus@example.com"}, nil); status != http.StatusConflict {
		t.Errorf("by a laptop: %d", status)
	}
	gus := w.member("gus@example.com", "", "")
	if a := gus.visit(p.URL); strings.Contains(a.body, "GET / host=") {
		t.Errorf("shared with before there was an account: %v", a)
	}
	if a := bob.submit("/previews/"+p.Host+"/share", url.Values{"email": {" Gus@example.com "}}); a.status != http.StatusOK || !strings.Contains(a.body, "<dd>the team, gus@example.com</dd>") {
		t.Errorf("%v", a)
	}
	if a := gus.visit(p.URL); !strings.Contains(a.body, "GET / host=") {
		t.Errorf("shared with: %v", a)
	}
	for _, bad := range []string{"", "gus", "Gus <gus@example.com>", "a@b, c@d"} {
		if a := bob.submit("/previews/"+p.Host+"/share", url.Values{"email": {bad}}); a.status != http.StatusBadRequest || !strings.Contains(a.body, "not an e-mail address") {
			t.Errorf("%q: %v", bad, a)
		}
	}
	if a := bob.submit("/previews/"+p.Host+"/share", url.Values{"email": {"gus@example.com"}, "remove": {"true"}}); a.status != http.StatusOK || !strings.Contains(a.body, "<dd>the team</dd>") {
		t.Errorf("%v", a)
	}
	if a := gus.visit(p.URL); strings.Contains(a.body, "GET / host=") {
		t.Errorf("no longer shared with: %v", a)
	}
	if a := bob.submit("/previews/"+p.Host+"/delete", nil); a.status != http.StatusOK || a.url != "https://"+domain+"/" || strings.Contains(a.body, p.Host) {
		t.Errorf("%v", a)
	}
}

// An admin makes a cluster known; its token is shown once.
func TestAddCluster(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	bob := w.member("bob@example.com", w.team(), store.Member)
	oli, _ := w.others()
	form := url.Values{"team": {w.team()}, "name": {" prod "}}
	for name, c := range map[string]struct {
		who    *browser
		form   url.Values
		status int
	}{
		"a member":              {bob, form, 403},
		"another team's admin":  {oli, form, 404},
		"a stranger":            {w.browser().still(), form, 303},
		"no name":               {ann, url.Values{"team": {w.team()}, "name": {" "}}, 400},
		"a name that is a book": {ann, url.Values{"team": {w.team()}, "name": {strings.Repeat("x", 101)}}, 400},
	} {
		if a := c.who.submit("/clusters", c.form); a.status != c.status {
			t.Errorf("%s: want %d: %v", name, c.status, a)
		}
	}
	a := ann.submit("/clusters", form)
	token := regexp.MustCompile(`doppel_link_[\w-]+`).FindString(a.body)
	id := regexp.MustCompile(`/clusters/(\w+)`).FindStringSubmatch(a.body)
	if a.status != http.StatusOK || token == "" || id == nil || !strings.Contains(a.body, "doppel helm upgrade --set relay.url=https://"+domain) {
		t.Fatalf("%v", a)
	}
	ca, err := os.ReadFile(filepath.Join(w.relay.cfg.DataDir, caFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{relayapi.SecretCommand("doppel", token, string(ca)), "If it is in another namespace than doppel"} {
		if !strings.Contains(html.UnescapeString(a.body), want) {
			t.Errorf("want %q: %v", want, a)
		}
	}
	if a := ann.visit("https://" + domain + id[0]); a.status != http.StatusOK || strings.Contains(a.body, token) {
		t.Errorf("%v", a)
	}
	w.join(&cluster{id: id[1], token: token})
	if a := ann.submit("/clusters", form); a.status != http.StatusConflict || !strings.Contains(a.body, "has a cluster of that name") {
		t.Errorf("twice: %v", a)
	}
	for who, b := range map[string]*browser{"a member": bob, "another team's": oli} {
		if a := b.visit("https://" + domain + "/"); strings.Contains(a.body, `action="/clusters"`) != (b == oli) || strings.Contains(a.body, "prod") != (b == bob) {
			t.Errorf("%s: %v", who, a)
		}
	}
}

func TestClusterPage(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	l := ann.login()
	c := l.cluster("prod", echo)
	p := l.preview(c, "web")
	bob := w.member("bob@example.com", w.team(), store.Member)
	oli, _ := w.others()
	page := "https://" + domain + "/clusters/" + c.id
	w.until("what the cluster tells", func() bool { return strings.Contains(bob.visit(page).body, "<dd>test</dd>") })
	for _, part := range []string{"connected</span> since", "<dd>test</dd>", "<dt>Laptops</dt><dd>1</dd>", "crew"} {
		if a := bob.visit(page); a.status != http.StatusOK || !strings.Contains(a.body, part) || strings.Contains(a.body, `action="/clusters`) {
			t.Errorf("%q: %v", part, a)
		}
	}
	if a := oli.visit(page); a.status != http.StatusNotFound {
		t.Errorf("of another team: %v", a)
	}
	for _, action := range []string{"/token", "/delete"} {
		for name, who := range map[string]struct {
			b      *browser
			status int
		}{"a member": {bob, 403}, "another team": {oli, 404}, "a stranger": {w.browser().still(), 303}} {
			if a := who.b.submit("/clusters/"+c.id+action, nil); a.status != who.status {
				t.Errorf("%s, %s: want %d: %v", action, name, who.status, a)
			}
		}
	}
	if w.relay.links.Len() != 1 {
		t.Fatal("the link ended")
	}

	a := ann.submit("/clusters/"+c.id+"/token", nil)
	token := regexp.MustCompile(`doppel_link_[\w-]+`).FindString(a.body)
	if a.status != http.StatusOK || token == "" || token == c.token || !strings.Contains(a.body, "another namespace than doppel") {
		t.Fatalf("%v", a)
	}
	w.until("the end of the link with the old token", func() bool {
		return strings.Contains(ann.visit(page).body, "not connected")
	})
	if conn, err := w.upgrade(c.token); err == nil {
		conn.Close()
		t.Error("the old token counts")
	}
	c.token = token
	w.join(c)
	if a := ann.visit(page); !strings.Contains(a.body, "connected</span> since") {
		t.Errorf("%v", a)
	}

	if a := ann.submit("/clusters/"+c.id+"/delete", nil); a.status != http.StatusOK || strings.Contains(a.body, p.Host) || strings.Contains(a.body, "prod") {
		t.Errorf("%v", a)
	}
	if a := ann.visit(page); a.status != http.StatusNotFound {
		t.Errorf("%v", a)
	}
	w.until("the end of the link", func() bool { return w.relay.links.Len() == 0 })
}
