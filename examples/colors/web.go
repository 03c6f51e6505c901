package colors

import (
	"context"
	_ "embed"
	"html/template"
	"net/http"
)

//go:embed page.html
var pageHTML string

var page = template.Must(template.New("page").Parse(pageHTML))

// web is verylargejavaservice.
type web struct{ dataProcessing string }

// state is what the page shows; its script asks for it again every second.
type state struct {
	summary
	Web string `json:"web"`
}

func (s *web) load(ctx context.Context) state {
	st := state{Web: host()}
	if err := get(ctx, s.dataProcessing+"/summary", &st.summary); err != nil {
		st.Error = err.Error()
	}
	if !colorRE.MatchString(st.Color) {
		st.Color = "" // not ours, or nobody answered
	}
	return st
}

func (s *web) state(w http.ResponseWriter, r *http.Request) { answer(w, s.load(r.Context())) }

// color passes on the colour of dataprocessingservice, for those who ask with curl.
func (s *web) color(w http.ResponseWriter, r *http.Request) {
	var c string
	if err := get(r.Context(), s.dataProcessing+"/color", &c); err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	answer(w, c)
}

func (s *web) page(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	_ = page.Execute(w, s.load(r.Context()))
}
