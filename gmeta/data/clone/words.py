"""What texts of the clone are made of: topics, each with words of its own, and words that tell nothing."""

from __future__ import annotations

_LINES = """
coffee espresso latte roast beans barista cappuccino mocha brew crema
noodles ramen broth dumpling soy wok bamboo ginger sesame chili
bakery bread croissant flour sourdough pastry cream butter tart oven
fruit mango peach melon berry orchard citrus grape plum juice
seafood shrimp crab oyster salmon harbour fillet lobster squid tide
barbecue grill ribs charcoal smoke steak sauce skewer brisket pepper
football league goal striker penalty stadium coach fixture keeper derby
basketball dunk rebound court playoff guard buzzer hoop assist jersey
running marathon sneakers trail pace sprint lap treadmill stride finish
yoga meditation stretch pose breath mat balance calm flexible wellness
swimming pool goggles freestyle lane dive splash float lifeguard butterfly
cycling bicycle pedal saddle gear helmet chain route climb peloton
camping tent campfire lantern backpack forest hiking sleeping canyon compass
travel flight hotel passport luggage beach resort itinerary island ticket
railway train station platform carriage locomotive timetable track express conductor
driving car engine tyre petrol garage brake parking highway dashboard
electric charger battery motor range voltage plug hybrid socket kilowatt
movies cinema director trailer actor premiere popcorn sequel screenplay drama
music concert guitar album melody singer rhythm piano chorus lyrics
games console controller quest level multiplayer arcade avatar pixel boss
comics manga hero villain sketch panel cape anime issue costume
reading novel library author chapter bookshop poetry paperback fiction essay
painting canvas gallery brush portrait pigment museum exhibit easel watercolour
photography camera lens shutter tripod portrait exposure aperture film focus
fashion dress silk collar tailor runway scarf velvet blouse designer
jewellery necklace gold ring pearl bracelet diamond silver pendant emerald
cosmetics lipstick mascara blush palette skincare serum foundation perfume cleanser
hair salon haircut shampoo curl braid barber dye fringe conditioner
children toy puzzle blocks doll nursery stroller crayon rattle playground
school exam homework teacher lesson grammar algebra classroom diploma tutor
pets puppy kitten leash kibble veterinary collar litter aquarium grooming
garden seeds tulip soil compost shovel hedge rose greenhouse watering
furniture sofa wardrobe cushion lamp carpet shelf mattress walnut curtain
cleaning detergent vacuum mop sponge laundry bleach dustbin polish broom
phones handset screen charger signal selfie ringtone roaming camera keypad
computers laptop keyboard processor monitor memory router cloud printer webcam
banking deposit savings loan interest transfer account branch mortgage wallet
insurance policy premium claim cover accident liability adviser pension health
medicine pharmacy tablet clinic doctor vaccine bandage dentist therapy vitamin
weather umbrella storm sunshine forecast snow breeze rainbow thunder cloudy
"""

_PLAIN = """
new best today special daily popular classic free local original fresh great super official members weekend offer value
choice star first double extra city season family limited selected online welcome
"""

TOPICS: tuple[tuple[str, ...], ...] = tuple(tuple(line.split()) for line in _LINES.split("\n") if line)
"""The words of each topic."""
PLAIN: tuple[str, ...] = tuple(_PLAIN.split())
"""Words of any topic."""
