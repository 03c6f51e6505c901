package colors

import (
	"fmt"
	"net/http"
	"regexp"
	"sync/atomic"
)

// color is what CSS takes as a colour's name or number; the page puts it into a style.
var colorRE = regexp.MustCompile(`^([a-zA-Z]{1,32}|#[0-9a-fA-F]{3,8})$`)

// processing is dataprocessingservice.
type processing struct {
	dataStore string
	color     atomic.Value // string
}

func (p *processing) setColor(c string) error {
	if !colorRE.MatchString(c) {
		return fmt.Errorf("color %q: want a name or #rrggbb", c)
	}
	p.color.Store(c)
	return nil
}

// getColor answers the colour as JSON, which for a string is the string in quotes.
func (p *processing) getColor(w http.ResponseWriter, _ *http.Request) { answer(w, p.color.Load()) }

// postColor changes the colour of the running process: POST /color?c=orange.
func (p *processing) postColor(w http.ResponseWriter, r *http.Request) {
	if err := p.setColor(r.FormValue("c")); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p.getColor(w, r)
}

// summary is what dataprocessingservice makes of the records of verylargedatastore.
type summary struct {
	Color   string             `json:"color"`
	Host    string             `json:"host"`
	Revenue map[string]float64 `json:"revenue,omitempty"` // by season
	Orders  int                `json:"orders"`
	Error   string             `json:"error,omitempty"`
}

func (p *processing) summary(w http.ResponseWriter, r *http.Request) {
	s := summary{Color: p.color.Load().(string), Host: host(), Revenue: map[string]float64{}}
	var recs []record
	if err := get(r.Context(), p.dataStore+"/records", &recs); err != nil {
		s.Error = err.Error()
	}
	for _, rec := range recs {
		s.Revenue[rec.Season] += rec.Price * float64(rec.Orders)
		s.Orders += rec.Orders
	}
	answer(w, s)
}

// record is a line of verylargedatastore.
type record struct {
	Item   string  `json:"item"`
	Season string  `json:"season"`
	Price  float64 `json:"price"`
	Orders int     `json:"orders"`
}

// records answers all there is in the very large data store.
func records(w http.ResponseWriter, _ *http.Request) {
	answer(w, []record{
		{"Raincoat", "Spring", 89, 120},
		{"Tulip bulbs", "Spring", 6.5, 940},
		{"Sun hat", "Summer", 24, 610},
		{"Kayak", "Summer", 649, 31},
		{"Rake", "Fall", 19.9, 275},
		{"Lantern", "Fall", 32, 188},
		{"Sledge", "Winter", 79, 143},
		{"Mittens", "Winter", 15, 820},
	})
}
